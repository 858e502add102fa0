UPDATE decuwatch.stream_positions SET position = $4, moved_at = clock_timestamp()
WHERE stream = $1 AND created = $2 AND position = $3

UPDATE decuwatch.silences SET ended_by = $2, ended_at = clock_timestamp()
WHERE id = $1 AND ended_at IS NULL AND ends_at > clock_timestamp()

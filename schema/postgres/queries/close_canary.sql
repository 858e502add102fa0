UPDATE decuwatch.canaries SET outcome = $3, decided_at = clock_timestamp()
WHERE source = $1 AND event_id = $2 AND outcome IS NULL

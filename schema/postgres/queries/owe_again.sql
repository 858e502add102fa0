UPDATE decuwatch.outbox SET delivered_at = NULL, attempts = 0, next_attempt_at = clock_timestamp()
WHERE sink = $2 AND message_id = ANY ($1) AND delivered_at IS NOT NULL

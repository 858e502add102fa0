UPDATE decuwatch.outbox SET attempts = attempts + 1, last_error = $2,
    next_attempt_at = clock_timestamp() + $3::interval
WHERE id = $1 AND delivered_at IS NULL

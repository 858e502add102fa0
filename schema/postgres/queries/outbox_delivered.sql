UPDATE decuwatch.outbox SET delivered_at = clock_timestamp(), last_error = ''
WHERE id = ANY ($1) AND delivered_at IS NULL

WITH due AS (
    SELECT id FROM decuwatch.outbox
    WHERE sink = $1 AND delivered_at IS NULL AND next_attempt_at <= clock_timestamp()
    ORDER BY next_attempt_at, id LIMIT $2 FOR UPDATE SKIP LOCKED
), leased AS (
    UPDATE decuwatch.outbox o SET next_attempt_at = clock_timestamp() + $3::interval
    FROM due WHERE o.id = due.id
    RETURNING o.id, o.sink, o.message_id, o.subject, o.headers, o.body, o.attempts, o.created_at
)
SELECT id, sink, message_id, subject, headers, body, attempts, created_at FROM leased ORDER BY id

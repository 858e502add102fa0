WITH due AS (
    SELECT j.review_id FROM decuwatch.evidence_jobs j JOIN decuwatch.reviews r ON r.id = j.review_id
    WHERE j.state = 'pending' AND j.next_attempt_at <= clock_timestamp() AND r.ensemble_digest = ANY ($1)
    ORDER BY j.next_attempt_at, j.review_id LIMIT 1 FOR UPDATE OF j SKIP LOCKED
), taken AS (
    UPDATE decuwatch.evidence_jobs j
    SET attempts = attempts + 1, next_attempt_at = clock_timestamp() + $2::interval
    FROM due WHERE j.review_id = due.review_id
    RETURNING j.review_id, j.attempts
)
SELECT t.review_id, t.attempts, r.source, r.event_id, r.model, r.event_time, r.ensemble_digest
FROM taken t JOIN decuwatch.reviews r ON r.id = t.review_id

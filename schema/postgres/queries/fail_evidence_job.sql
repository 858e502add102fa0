UPDATE decuwatch.evidence_jobs SET state = $3, last_error = $4,
    next_attempt_at = clock_timestamp() + $5::interval
WHERE review_id = $1 AND state = 'pending' AND attempts = $2

UPDATE decuwatch.evidence_jobs SET state = 'pending', attempts = 0, next_attempt_at = clock_timestamp()
WHERE review_id = $1 AND state = 'failed'

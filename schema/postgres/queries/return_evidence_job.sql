UPDATE decuwatch.evidence_jobs SET attempts = attempts - 1, next_attempt_at = clock_timestamp()
WHERE review_id = $1 AND state = 'pending' AND attempts = $2

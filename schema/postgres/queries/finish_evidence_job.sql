UPDATE decuwatch.evidence_jobs SET state = 'done', done_at = clock_timestamp(), last_error = ''
WHERE review_id = $1 AND state = 'pending' AND attempts = $2

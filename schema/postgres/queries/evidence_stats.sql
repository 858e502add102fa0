SELECT count(*) FILTER (WHERE j.state = 'pending'), count(*) FILTER (WHERE j.state = 'failed'),
    coalesce(greatest(clock_timestamp() - min(r.opened_at) FILTER (WHERE j.state = 'pending'), interval '0'),
        interval '0')
FROM decuwatch.evidence_jobs j JOIN decuwatch.reviews r ON r.id = j.review_id
WHERE j.state IN ('pending', 'failed')

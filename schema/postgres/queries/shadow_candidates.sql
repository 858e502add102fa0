SELECT e.event_time, e.source, e.event_id, e.recorded_at FROM decuwatch.events e
WHERE e.model = $1 AND e.outcome = 'score' AND e.ensemble_digest <> $2
    AND e.recorded_at >= $3 AND e.recorded_at < $4
    AND NOT EXISTS (SELECT FROM decuwatch.canaries c
        WHERE c.source = e.source AND c.event_id = e.event_id AND c.model = e.model)
ORDER BY e.recorded_at LIMIT $5

SELECT * FROM (
    SELECT c.source, c.event_id, c.model, c.class_index, c.class_label, c.published_at, c.due_at,
        CASE
            WHEN EXISTS (SELECT FROM decuwatch.alerts a
                WHERE a.source = c.source AND a.event_id = c.event_id AND a.model = c.model AND a.kind = 'score')
                THEN 'caught'
            WHEN c.due_at <= clock_timestamp() THEN 'missed'
        END AS decided,
        coalesce((SELECT e.outcome FROM decuwatch.events e
            WHERE e.source = c.source AND e.event_id = c.event_id AND e.model = c.model), '')
    FROM decuwatch.canaries c WHERE c.outcome IS NULL
) open
WHERE decided IS NOT NULL ORDER BY published_at LIMIT 1000

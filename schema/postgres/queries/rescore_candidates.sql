SELECT s.event_time, s.source, s.event_id FROM decuwatch.scores s
WHERE s.model = $1 AND s.event_time >= $4 AND s.event_time < $5
    AND ($6::integer[] IS NULL OR s.class_index = ANY ($6))
    AND (s.event_time, s.source, s.event_id) > ($7, $8, $9)
    AND s.settings !~ '^[a-z_]+ start='
    AND (s.ensemble_digest, s.settings) IS DISTINCT FROM ($2, $3)
    AND NOT EXISTS (SELECT FROM decuwatch.rescores r
        WHERE r.event_time = s.event_time AND r.source = s.source AND r.event_id = s.event_id
            AND r.ensemble_digest = $2 AND r.settings = $3)
    AND NOT EXISTS (SELECT FROM decuwatch.canaries c
        WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model)
ORDER BY s.event_time, s.source, s.event_id LIMIT $10

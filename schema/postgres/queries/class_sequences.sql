SELECT k.class_index, k.class_label, s.event_time, s.source || ' ' || s.event_id, s.class_gap,
    1 / s.inclusion_probability
FROM (
    SELECT class_index, max(class_label) AS class_label FROM decuwatch.class_day_parts
    WHERE model = $1 AND ensemble_digest = $2 AND settings = $3
        AND day >= date_trunc('day', $4::timestamptz, 'UTC')
    GROUP BY class_index
) k
LEFT JOIN (
    SELECT class_index, max(event_time) AS event_time FROM decuwatch.alerts
    WHERE kind = 'class_drift' AND model = $1 AND ensemble_digest = $2 AND settings = $3
    GROUP BY class_index
) a USING (class_index)
CROSS JOIN LATERAL (
    SELECT event_time, source, event_id, class_gap, inclusion_probability
    FROM decuwatch.production_scores s
    WHERE s.model = $1 AND s.class_index = k.class_index AND s.ensemble_digest = $2 AND s.settings = $3
        AND s.event_time > greatest($4, a.event_time + $5::interval)
    ORDER BY s.event_time DESC, s.source DESC, s.event_id DESC LIMIT $6
) s
ORDER BY k.class_index, s.event_time, s.source, s.event_id

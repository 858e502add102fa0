WITH labels AS (
    SELECT class_index, max(class_label) AS label FROM (
        SELECT class_index, class_label FROM decuwatch.class_day_parts WHERE model = $1
        UNION ALL SELECT class_index, class_label FROM decuwatch.class_hour_parts WHERE model = $1
    ) known GROUP BY class_index
)
SELECT m.event_time, m.source, m.event_id, m.class_index, coalesce(l.label, ''),
    m.ensemble_digest = $2 AND m.settings = $3, m.measurement, m.value, m.mean_distance, m.saturated
FROM decuwatch.series_measurements m LEFT JOIN labels l USING (class_index)
WHERE m.model = $1 AND (m.ensemble_digest = $2 AND m.settings = $3 OR m.ensemble_digest = $4 AND m.settings = $5)
    AND m.event_time >= $6 AND m.event_time < $7
ORDER BY m.event_time, m.source, m.event_id

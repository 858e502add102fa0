SELECT k.class_index, s.class_label, count(*), 
    sum(s.class_gap_mean_distance / s.inclusion_probability) / sum(1 / s.inclusion_probability)
FROM unnest($4::integer[]) k (class_index)
CROSS JOIN LATERAL (
    SELECT class_label, class_gap_mean_distance, inclusion_probability FROM decuwatch.scores
    WHERE model = $1 AND class_index = k.class_index AND ensemble_digest = $2 AND settings = $3 AND event_time >= $5
    ORDER BY event_time DESC LIMIT $6
) s
GROUP BY 1, 2 ORDER BY 1

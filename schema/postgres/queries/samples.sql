SELECT class_index, value, mean_distance, saturated, weight FROM decuwatch.series_measurements s
WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND event_time >= $4 AND event_time < $5
    AND measurement = $6
    AND NOT EXISTS (SELECT FROM decuwatch.reviews r
        WHERE r.verdict = 'confirmed' AND r.source = s.source AND r.event_id = s.event_id AND r.model = s.model)

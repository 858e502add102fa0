SELECT class_index, CASE $6 WHEN 'class_gap' THEN class_gap ELSE request_risk END,
    CASE $6 WHEN 'class_gap' THEN class_gap_mean_distance ELSE request_risk_mean_distance END,
    CASE $6 WHEN 'class_gap' THEN class_gap_saturated ELSE request_risk_saturated END
FROM decuwatch.production_scores s
WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND event_time >= $4 AND event_time < $5
    AND NOT EXISTS (SELECT FROM decuwatch.reviews r
        WHERE r.verdict = 'confirmed' AND r.source = s.source AND r.event_id = s.event_id AND r.model = s.model)

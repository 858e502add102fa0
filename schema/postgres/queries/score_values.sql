SELECT CASE $6 WHEN 'class_gap' THEN class_gap ELSE request_risk END::float8 FROM decuwatch.production_scores
WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND ($4::integer IS NULL OR class_index = $4)
    AND event_time >= $5
ORDER BY event_time DESC LIMIT $7

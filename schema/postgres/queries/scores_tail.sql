SELECT coalesce(percentile_disc(1 - $6::float8)
    WITHIN GROUP (ORDER BY CASE $7 WHEN 'class_gap' THEN class_gap ELSE request_risk END::float8), 0),
    count(*)
FROM decuwatch.production_scores
WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND class_index = ANY ($4) AND event_time >= $5

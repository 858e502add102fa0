SELECT coalesce(percentile_disc(1 - $6::float8) WITHIN GROUP (ORDER BY value), 0), count(*)
FROM decuwatch.production_measurements
WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND class_index = ANY ($4) AND event_time >= $5
    AND measurement = $7

SELECT value FROM decuwatch.series_measurements
WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND ($4::integer IS NULL OR class_index = $4)
    AND event_time >= $5 AND measurement = $6
ORDER BY event_time DESC LIMIT $7

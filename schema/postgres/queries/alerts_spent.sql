SELECT model, measurement, severity, class_index, count(*) FILTER (WHERE recorded_at >= $3), max(recorded_at)
FROM decuwatch.alerts
WHERE model = ANY ($1) AND recorded_at >= $2 AND kind = 'score' AND delivery = 'owed'
GROUP BY 1, 2, 3, 4

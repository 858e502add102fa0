SELECT date_trunc('hour', recorded_at, 'UTC'), model, class_index, max(class_label), severity,
    count(*) FILTER (WHERE delivery = 'class_budget'), count(*) FILTER (WHERE delivery = 'model_budget'),
    count(*) FILTER (WHERE delivery = 'cool_down')
FROM decuwatch.alerts
WHERE delivery IN ('class_budget', 'model_budget', 'cool_down') AND recorded_at >= $1 AND recorded_at < $2
GROUP BY 1, 2, 3, 5
ORDER BY 1, 2, 3, 5

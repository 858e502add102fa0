SELECT DISTINCT model, ensemble_digest, settings FROM (
    SELECT model, ensemble_digest, settings FROM decuwatch.class_day_parts
    UNION ALL SELECT model, ensemble_digest, settings FROM decuwatch.class_hour_parts
    UNION ALL SELECT model, ensemble_digest, settings FROM decuwatch.thresholds
    UNION ALL SELECT model, ensemble_digest, settings FROM decuwatch.rescores
) known
WHERE ensemble_digest LIKE $1 || '%' ORDER BY 1, 2, 3

SELECT row_to_json(t) FROM (
    SELECT DISTINCT ON (model, ensemble_digest, settings, measurement, scope, class_index, severity)
        *, class_index AS class
    FROM decuwatch.thresholds
    ORDER BY model, ensemble_digest, settings, measurement, scope, class_index, severity, id DESC
) t WHERE NOT withdrawn ORDER BY id

INSERT INTO decuwatch.thresholds (change_id, model, ensemble_digest, settings, measurement, scope, class_index,
    severity, value, distance, withdrawn, origin, n, alpha, achieved, window_from, window_to, set_by, reason, set_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)
RETURNING id

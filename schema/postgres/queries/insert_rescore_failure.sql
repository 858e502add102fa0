INSERT INTO decuwatch.rescore_failures (run, source, event_id, event_time, model, ensemble_digest, kind, reason)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)

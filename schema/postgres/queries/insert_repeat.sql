INSERT INTO decuwatch.repeats (stream, sequence, digest, source, event_id, model, delivered)
VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING

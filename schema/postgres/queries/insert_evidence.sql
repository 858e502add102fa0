INSERT INTO decuwatch.evidence (review_id, name, content_type, body) VALUES ($1, $2, $3, $4)
ON CONFLICT DO NOTHING

SELECT content_type, body, made_at FROM decuwatch.evidence WHERE review_id = $1 AND name = $2

SELECT name, content_type, NULL::bytea, made_at FROM decuwatch.evidence WHERE review_id = $1
ORDER BY length(name), name

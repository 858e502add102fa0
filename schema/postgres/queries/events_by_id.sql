SELECT row_to_json(e) FROM decuwatch.events e
WHERE event_id = $1 AND ($2 = '' OR source = $2) AND ($3 = '' OR model = $3) ORDER BY source, model LIMIT 2

SELECT row_to_json(e) FROM decuwatch.events e WHERE source = $1 AND event_id = $2 AND model = $3

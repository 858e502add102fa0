SELECT row_to_json(s) FROM decuwatch.scores s
WHERE event_time = $1 AND source = $2 AND event_id = $3 AND ensemble_digest = $4 AND model = $5

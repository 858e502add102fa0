SELECT row_to_json(a) FROM decuwatch.alerts a
WHERE source = $1 AND event_id = $2 AND model = $3 AND kind = 'score'
ORDER BY severity = 'critical' DESC, measurement, id

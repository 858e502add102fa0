SELECT id FROM decuwatch.alerts WHERE source = $1 AND event_id = $2 AND model = $3 AND kind = 'score'
ORDER BY measurement, id

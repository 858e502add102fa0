SELECT row_to_json(s) FROM decuwatch.scores s
WHERE event_time = $1 AND source = $2 AND event_id = $3 AND ensemble_digest = $4 AND model = $5
UNION ALL
SELECT * FROM (
    SELECT row_to_json(r) FROM decuwatch.rescores r
    WHERE event_time = $1 AND source = $2 AND event_id = $3 AND ensemble_digest = $4 AND model = $5
    ORDER BY recorded_at DESC
) rescored
LIMIT 1

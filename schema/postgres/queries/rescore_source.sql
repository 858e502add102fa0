SELECT row_to_json(s), (s.ensemble_digest, s.settings) IS NOT DISTINCT FROM ($5, $6)
    OR EXISTS (SELECT FROM decuwatch.rescores r
        WHERE r.event_time = s.event_time AND r.source = s.source AND r.event_id = s.event_id
            AND r.ensemble_digest = $5 AND r.settings = $6)
FROM decuwatch.scores s WHERE event_time = $1 AND source = $2 AND event_id = $3 AND model = $4 LIMIT 1

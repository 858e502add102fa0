SELECT row_to_json(r) FROM decuwatch.review_list r WHERE id = $1
UNION ALL
SELECT row_to_json(r) FROM decuwatch.alerts a JOIN decuwatch.review_list r
    ON r.source = a.source AND r.event_id = a.event_id AND r.model = a.model
WHERE a.id = $1 AND a.kind = 'score' AND r.id <> $1

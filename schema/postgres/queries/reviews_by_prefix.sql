SELECT row_to_json(r) FROM decuwatch.review_list r
WHERE id IN (
    SELECT id FROM decuwatch.reviews WHERE starts_with(id, $1)
    UNION
    SELECT o.id FROM decuwatch.alerts a JOIN decuwatch.reviews o
        ON o.source = a.source AND o.event_id = a.event_id AND o.model = a.model
    WHERE starts_with(a.id, $1) AND a.kind = 'score'
    LIMIT 2)

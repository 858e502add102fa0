SELECT row_to_json(a) FROM decuwatch.alerts a
WHERE id = ANY ($1)
    AND NOT EXISTS (SELECT FROM decuwatch.outbox o WHERE o.sink = $2 AND o.message_id = a.id)

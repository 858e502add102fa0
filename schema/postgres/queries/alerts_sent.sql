SELECT a.id,
    CASE WHEN a.delivery <> 'owed' THEN 'held_back' WHEN o.message_id IS NOT NULL THEN 'owed' ELSE 'sent' END
FROM decuwatch.alerts a
LEFT JOIN decuwatch.outbox o ON o.sink = $1 AND o.message_id = a.id AND o.delivered_at IS NULL
WHERE a.recorded_at >= $2 OR o.message_id IS NOT NULL

SELECT id FROM decuwatch.alerts a
WHERE delivery = $1 AND ($3::interval = '0' OR recorded_at >= now() - $3::interval)
    AND NOT EXISTS (SELECT FROM decuwatch.outbox o
        WHERE o.sink = $2 AND o.message_id = a.id AND o.delivered_at IS NULL)
UNION
SELECT message_id FROM decuwatch.outbox
WHERE sink = $2 AND ($3::interval = '0' OR delivered_at >= now() - $3::interval) AND delivered_at IS NOT NULL
ORDER BY 1

SELECT
    EXISTS (SELECT FROM decuwatch.events WHERE stream = $3 AND sequence = $4 AND digest = $5)
    OR EXISTS (SELECT FROM decuwatch.dead_letters WHERE stream = $3 AND sequence = $4 AND digest = $5)
    OR EXISTS (SELECT FROM decuwatch.repeats WHERE stream = $3 AND sequence = $4 AND digest = $5),
    e.digest::text, e.outcome
FROM (SELECT) AS one LEFT JOIN decuwatch.events e ON e.source = $1 AND e.event_id = $2 AND e.model = $6

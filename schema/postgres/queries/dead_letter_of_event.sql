SELECT kind, field, reason FROM decuwatch.dead_letters
WHERE event_id = $1 AND source IS NOT NULL AND ($2 = '' OR source = $2) AND ($3 = '' OR model = $3)
ORDER BY recorded_at DESC LIMIT 1

SELECT sequence, digest, source, event_id, outcome, reason FROM decuwatch.events
WHERE stream = $1 AND sequence BETWEEN $2 AND $3 AND outcome <> 'dead_letter'
UNION ALL
SELECT sequence, digest, coalesce(source, ''), coalesce(event_id, ''), 'dead_letter', kind
FROM decuwatch.dead_letters
WHERE stream = $1 AND sequence BETWEEN $2 AND $3
UNION ALL
SELECT sequence, digest, source, event_id, 'repeat', '' FROM decuwatch.repeats
WHERE stream = $1 AND sequence BETWEEN $2 AND $3
ORDER BY 1, 2

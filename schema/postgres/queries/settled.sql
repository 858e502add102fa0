SELECT sequence, digest, recorded_at FROM decuwatch.events WHERE stream = $1 AND sequence BETWEEN $2 AND $3
UNION ALL
SELECT sequence, digest, recorded_at FROM decuwatch.dead_letters WHERE stream = $1 AND sequence BETWEEN $2 AND $3
UNION ALL
SELECT sequence, digest, recorded_at FROM decuwatch.repeats WHERE stream = $1 AND sequence BETWEEN $2 AND $3
ORDER BY 1, 2

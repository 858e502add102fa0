WITH old AS (SELECT clock_timestamp() - $3::interval AS t)
SELECT 1 + greatest(begun_at,
    (SELECT max(sequence) FROM decuwatch.events, old WHERE stream = $1 AND recorded_at BETWEEN $2 AND t),
    (SELECT max(sequence) FROM decuwatch.dead_letters, old WHERE stream = $1 AND recorded_at BETWEEN $2 AND t),
    (SELECT max(sequence) FROM decuwatch.repeats, old WHERE stream = $1 AND recorded_at BETWEEN $2 AND t))
FROM decuwatch.stream_positions WHERE stream = $1 AND created = $2

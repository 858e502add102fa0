WITH bound AS (SELECT clock_timestamp() - $4::interval AS t)
SELECT least(
    (SELECT min(sequence) FROM decuwatch.events, bound
        WHERE stream = $1 AND sequence BETWEEN $2 AND $3 AND recorded_at > t),
    (SELECT min(sequence) FROM decuwatch.dead_letters, bound
        WHERE stream = $1 AND sequence BETWEEN $2 AND $3 AND recorded_at > t),
    (SELECT min(sequence) FROM decuwatch.repeats, bound
        WHERE stream = $1 AND sequence BETWEEN $2 AND $3 AND recorded_at > t))

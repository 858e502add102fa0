WITH settled AS (
    SELECT sequence FROM decuwatch.events
    WHERE stream = $1 AND sequence BETWEEN $2 AND $3 AND recorded_at > $4
    UNION SELECT sequence FROM decuwatch.dead_letters
    WHERE stream = $1 AND sequence BETWEEN $2 AND $3 AND recorded_at > $4
    UNION SELECT sequence FROM decuwatch.repeats
    WHERE stream = $1 AND sequence BETWEEN $2 AND $3 AND recorded_at > $4
    UNION SELECT $2 - 1
    UNION SELECT $3 + 1
), following AS (
    SELECT sequence, lead(sequence) OVER (ORDER BY sequence) AS next FROM settled
)
SELECT sequence + 1, next - 1 FROM following WHERE next > sequence + 1 ORDER BY 1

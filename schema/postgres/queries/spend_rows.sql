WITH found AS (
    SELECT *, greatest(0, extract(epoch FROM clock_timestamp() - updated_at)) AS seconds
    FROM decuwatch.budgets WHERE model = $1 FOR UPDATE
), was AS (
    SELECT model,
        CASE WHEN $2::float8 > 0 THEN greatest(0, hour_rows - $2::float8 * seconds / 3600) ELSE 0 END AS hour,
        CASE WHEN $3::float8 > 0 THEN greatest(0, day_rows - $3::float8 * seconds / 86400) ELSE 0 END AS day
    FROM found
), room AS (
    SELECT *, least(CASE WHEN $2::float8 > 0 THEN $2 - hour ELSE 'Infinity' END,
        CASE WHEN $3::float8 > 0 THEN $3 - day ELSE 'Infinity' END) AS rows
    FROM was
), taken AS (
    -- An event that costs more than a whole bucket takes a full one.
    SELECT *, CASE
        WHEN $6::boolean THEN $4::float8
        WHEN rows >= least($4, nullif($2, 0), nullif($3, 0)) THEN greatest($4, least($5::float8, rows))
        ELSE 0 END AS granted
    FROM room
)
UPDATE decuwatch.budgets b SET updated_at = clock_timestamp(),
    hour_rows = CASE WHEN $2 > 0 THEN greatest(0, hour + granted) ELSE 0 END,
    day_rows = CASE WHEN $3 > 0 THEN greatest(0, day + granted) ELSE 0 END
FROM taken WHERE b.model = taken.model
RETURNING granted, hour_rows, day_rows, coalesce((SELECT share FROM decuwatch.shares s
    WHERE s.model = b.model ORDER BY at DESC LIMIT 1), 1)

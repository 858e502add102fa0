INSERT INTO decuwatch.silences (model, class_index, class_label, measurement, starts_at, ends_at, author, reason)
VALUES ($1, $2, $3, $4, coalesce($5, clock_timestamp()), coalesce($5, clock_timestamp()) + $6::interval, $7, $8)
RETURNING id

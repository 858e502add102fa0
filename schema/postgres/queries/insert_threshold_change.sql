INSERT INTO decuwatch.threshold_changes (kind, undoes, set_by, reason)
VALUES ($1, nullif($2::bigint, 0), $3, $4) RETURNING id, set_at

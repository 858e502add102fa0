SELECT CASE
    WHEN $1::timestamptz < now() - $2::interval THEN now() - $2::interval
    WHEN decuwatch.ensure_partition($1) THEN NULL
END

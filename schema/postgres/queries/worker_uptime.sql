SELECT coalesce(max(extract(epoch FROM clock_timestamp() - started_at)), 0)::float8 FROM decuwatch.workers
WHERE id = $1

INSERT INTO decuwatch.workers (id, host, model, ensemble_digest, settings)
SELECT $1, $2, m, d, s FROM unnest($3::text[], $4::text[], $5::text[]) AS w(m, d, s)
ON CONFLICT (id, model) DO UPDATE SET seen_at = clock_timestamp()

INSERT INTO decuwatch.workers (id, host, model, ensemble_digest, settings, shadows)
SELECT $1, $2, m, d, s, coalesce(string_to_array(nullif(x, ''), ','), '{}')
FROM unnest($3::text[], $4::text[], $5::text[], $6::text[]) AS w(m, d, s, x)
ON CONFLICT (id, model) DO UPDATE SET seen_at = clock_timestamp()

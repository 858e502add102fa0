SELECT coalesce(min(value) FILTER (WHERE reached >= (1 - $6::float8) * weights), 0), count(*)
FROM (
    SELECT value, sum(weight) OVER (ORDER BY value) AS reached, sum(weight) OVER () AS weights
    FROM decuwatch.production_measurements
    WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND class_index = ANY ($4) AND event_time >= $5
        AND measurement = $7
) weighed

WITH scored AS (
    SELECT coalesce(sum(n), 0)::bigint AS n FROM decuwatch.class_hour_parts
    WHERE hour >= $3 AND hour < $4 AND ($1 = '' OR model = $1) AND ($2::integer IS NULL OR class_index = $2)
), alerted AS (
    SELECT count(DISTINCT (source, event_id, model)) AS n FROM decuwatch.production_alerts
    WHERE kind = 'score' AND event_time >= $3 AND event_time < $4 AND ($1 = '' OR model = $1)
        AND ($2::integer IS NULL OR class_index = $2)
), reviewed AS (
    SELECT * FROM decuwatch.reviews
    WHERE event_time >= $3 AND event_time < $4 AND ($1 = '' OR model = $1)
        AND ($2::integer IS NULL OR class_index = $2)
), events AS (
    SELECT bool_or(verdict IN ('confirmed', 'expected')) AS is_true FROM reviewed
    WHERE kind = 'alert' AND verdict IS NOT NULL GROUP BY source, event_id, model
)
SELECT scored.n, alerted.n,
    count(*) FILTER (WHERE kind = 'alert' AND verdict = 'confirmed'),
    count(*) FILTER (WHERE kind = 'alert' AND verdict = 'expected'),
    count(*) FILTER (WHERE kind = 'alert' AND verdict = 'false_alarm'),
    count(*) FILTER (WHERE kind = 'alert' AND verdict IS NULL),
    (SELECT count(*) FROM events WHERE is_true), (SELECT count(*) FROM events WHERE NOT is_true),
    count(*) FILTER (WHERE kind = 'sample'),
    count(*) FILTER (WHERE kind = 'sample' AND verdict IN ('confirmed', 'expected')),
    count(*) FILTER (WHERE kind = 'sample' AND verdict = 'false_alarm')
FROM scored CROSS JOIN alerted LEFT JOIN reviewed ON true GROUP BY scored.n, alerted.n

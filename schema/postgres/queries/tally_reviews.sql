WITH scored AS (
    SELECT coalesce(sum(n), 0)::bigint AS n, coalesce(sum(n + extra), 0) AS requests FROM decuwatch.class_hour_parts
    WHERE hour >= $3 AND hour < $4 AND ($1 = '' OR model = $1) AND ($2::integer IS NULL OR class_index = $2)
), alerted AS (
    SELECT count(*) AS n, coalesce(sum(1 / coalesce(s.inclusion_probability, 1)), 0) AS requests
    FROM (
        SELECT DISTINCT event_time, source, event_id, model
        FROM decuwatch.production_alerts
        WHERE kind = 'score' AND event_time >= $3 AND event_time < $4 AND ($1 = '' OR model = $1)
            AND ($2::integer IS NULL OR class_index = $2)
    ) a LEFT JOIN decuwatch.scores s USING (event_time, source, event_id, model)
), reviewed AS (
    SELECT r.*, 1 / coalesce(s.inclusion_probability, 1) AS weight
    FROM decuwatch.reviews r LEFT JOIN decuwatch.scores s USING (event_time, source, event_id, model)
    WHERE r.event_time >= $3 AND r.event_time < $4 AND ($1 = '' OR r.model = $1)
        AND ($2::integer IS NULL OR r.class_index = $2)
), events AS (
    SELECT bool_or(verdict IN ('confirmed', 'expected')) AS is_true, max(weight) AS weight FROM reviewed
    WHERE kind = 'alert' AND verdict IS NOT NULL GROUP BY source, event_id, model
), samples AS (
    SELECT verdict IN ('confirmed', 'expected') AS is_true, weight FROM reviewed
    WHERE kind = 'sample' AND verdict IS NOT NULL
)
SELECT scored.n, alerted.n,
    count(*) FILTER (WHERE kind = 'alert' AND verdict = 'confirmed'),
    count(*) FILTER (WHERE kind = 'alert' AND verdict = 'expected'),
    count(*) FILTER (WHERE kind = 'alert' AND verdict = 'false_alarm'),
    count(*) FILTER (WHERE kind = 'alert' AND verdict IS NULL),
    (SELECT count(*) FROM events WHERE is_true), (SELECT count(*) FROM events WHERE NOT is_true),
    count(*) FILTER (WHERE kind = 'sample'),
    count(*) FILTER (WHERE kind = 'sample' AND verdict IN ('confirmed', 'expected')),
    count(*) FILTER (WHERE kind = 'sample' AND verdict = 'false_alarm'),
    scored.requests, alerted.requests,
    (SELECT coalesce(sum(weight) FILTER (WHERE is_true), 0) / coalesce(sum(weight), 1) FROM events),
    (SELECT coalesce(sum(weight) ^ 2 / sum(weight ^ 2), 0) FROM events),
    (SELECT coalesce(sum(weight) FILTER (WHERE is_true), 0) / coalesce(sum(weight), 1) FROM samples),
    (SELECT coalesce(sum(weight) ^ 2 / sum(weight ^ 2), 0) FROM samples)
FROM scored CROSS JOIN alerted LEFT JOIN reviewed ON true
GROUP BY scored.n, alerted.n, scored.requests, alerted.requests

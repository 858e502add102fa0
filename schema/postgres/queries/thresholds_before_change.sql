SELECT row_to_json(t) FROM (
    SELECT DISTINCT ON (s.id) s.id AS key_id, coalesce(p.id, s.id) AS id, s.model, s.ensemble_digest, s.settings,
        s.measurement, s.scope, s.class_index AS class, s.severity,
        coalesce(p.value, s.value) AS value, coalesce(p.withdrawn, true) AS withdrawn,
        coalesce(p.origin, s.origin) AS origin, coalesce(p.n, s.n) AS n,
        CASE WHEN p.id IS NULL THEN s.distance ELSE p.distance END AS distance,
        CASE WHEN p.id IS NULL THEN s.alpha ELSE p.alpha END AS alpha,
        CASE WHEN p.id IS NULL THEN s.achieved ELSE p.achieved END AS achieved,
        CASE WHEN p.id IS NULL THEN s.window_from ELSE p.window_from END AS window_from,
        CASE WHEN p.id IS NULL THEN s.window_to ELSE p.window_to END AS window_to,
        s.set_by, s.reason, s.set_at
    FROM decuwatch.thresholds s
    LEFT JOIN decuwatch.thresholds p ON p.change_id < s.change_id
        AND (p.model, p.ensemble_digest, p.settings, p.measurement, p.scope, p.severity)
            = (s.model, s.ensemble_digest, s.settings, s.measurement, s.scope, s.severity)
        AND p.class_index IS NOT DISTINCT FROM s.class_index
    WHERE s.change_id = $1
    ORDER BY s.id, p.id DESC NULLS LAST
) t ORDER BY key_id

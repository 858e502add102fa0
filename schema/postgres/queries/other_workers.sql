SELECT o.model, o.ensemble_digest, o.settings, o.shadows, o.host, o.started_at,
    (o.started_at, o.id) < (w.started_at, w.id)
FROM decuwatch.workers w JOIN decuwatch.workers o ON o.model = w.model AND o.id <> w.id
WHERE w.id = $1 AND o.seen_at > clock_timestamp() - $2::interval
    AND (o.ensemble_digest, o.settings) IS DISTINCT FROM (w.ensemble_digest, w.settings)
    AND o.ensemble_digest <> ALL (w.shadows) AND w.ensemble_digest <> ALL (o.shadows)
ORDER BY o.model, o.started_at

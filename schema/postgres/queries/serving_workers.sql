SELECT model, ensemble_digest, settings, shadows, host, started_at, false
FROM decuwatch.workers WHERE model = $1 AND seen_at > clock_timestamp() - $2::interval
ORDER BY host, started_at

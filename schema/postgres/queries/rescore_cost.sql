SELECT coalesce(avg(unet_rows), 0)::double precision FROM (
    SELECT unet_rows FROM decuwatch.series_scores
    WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 ORDER BY event_time DESC LIMIT 1000
) newest

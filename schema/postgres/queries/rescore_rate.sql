WITH made AS (
    SELECT scored_at, unet_rows FROM decuwatch.scores
    WHERE model = $1 AND event_time >= now() - interval '1 day'
    UNION ALL
    SELECT scored_at, unet_rows FROM decuwatch.rescores
    WHERE model = $1 AND scored_at >= now() - interval '1 day'
), minutes AS (
    SELECT sum(unet_rows) AS rows, extract(epoch FROM max(scored_at) - min(scored_at)) AS seconds FROM made
    WHERE scored_at >= now() - interval '1 day'
    GROUP BY date_trunc('minute', scored_at) HAVING count(*) > 1
)
SELECT coalesce(
    (SELECT (rows / seconds)::double precision FROM minutes WHERE seconds >= 1 ORDER BY rows DESC LIMIT 1), 0
)

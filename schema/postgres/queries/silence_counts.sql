SELECT model, count(*) FROM decuwatch.silences
WHERE starts_at <= now() AND now() < coalesce(ended_at, ends_at) GROUP BY model

SELECT id, model, class_index, measurement FROM decuwatch.silences
WHERE model = ANY ($1) AND starts_at <= clock_timestamp() AND clock_timestamp() < coalesce(ended_at, ends_at)
ORDER BY id

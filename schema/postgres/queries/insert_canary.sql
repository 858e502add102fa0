INSERT INTO decuwatch.canaries (source, event_id, model, class_index, class_label, published_at, due_at)
VALUES ($1, $2, $3, $4, $5, clock_timestamp(), clock_timestamp() + $6::interval) ON CONFLICT DO NOTHING

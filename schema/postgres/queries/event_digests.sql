SELECT e.source, e.event_id, e.model, e.digest::text
FROM unnest($1::text[], $2::text[], $3::text[]) AS i (source, event_id, model)
JOIN decuwatch.events e USING (source, event_id, model)

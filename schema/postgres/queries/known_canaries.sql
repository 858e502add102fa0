SELECT source, event_id, model FROM decuwatch.canaries
JOIN unnest($1::text[], $2::text[], $3::text[]) AS i (source, event_id, model) USING (source, event_id, model)

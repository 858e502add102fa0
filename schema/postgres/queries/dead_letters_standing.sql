SELECT i.source, i.event_id, i.model, d.kind FROM decuwatch.dead_letters d
JOIN json_populate_recordset(NULL::decuwatch.events, $1) i USING (stream, sequence, digest)

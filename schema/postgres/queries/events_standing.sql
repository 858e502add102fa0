SELECT row_to_json(e) FROM decuwatch.events e
JOIN json_populate_recordset(NULL::decuwatch.events, $1) i USING (source, event_id, model)

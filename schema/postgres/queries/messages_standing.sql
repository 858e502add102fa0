SELECT row_to_json(e) FROM decuwatch.events e
JOIN json_populate_recordset(NULL::decuwatch.dead_letters, $1) i USING (stream, sequence, digest)

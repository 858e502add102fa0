INSERT INTO decuwatch.dead_letters (stream, sequence, digest, delivered, source, event_id, event_time, model, subject,
    payload, kind, field, reason, payload_size, payload_state)
SELECT stream, sequence, digest, delivered, source, event_id, event_time, model, subject,
    payload, kind, field, reason, payload_size, payload_state
FROM json_populate_recordset(NULL::decuwatch.dead_letters, $1) i
WHERE NOT EXISTS (SELECT FROM decuwatch.events e
    WHERE e.stream = i.stream AND e.sequence = i.sequence AND e.digest = i.digest)
ORDER BY stream, sequence, digest
ON CONFLICT (stream, sequence, digest) DO NOTHING
RETURNING stream, sequence, digest

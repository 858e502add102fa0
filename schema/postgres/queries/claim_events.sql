INSERT INTO decuwatch.events AS e (source, event_id, digest, outcome, reason, event_time, model, ensemble_digest,
    stream, sequence, delivered)
SELECT source, event_id, digest, outcome, reason, event_time, model, ensemble_digest, stream, sequence, delivered
FROM json_populate_recordset(NULL::decuwatch.events, $1) i
WHERE (outcome <> 'score' OR event_time >= now() - $2::interval)
    AND NOT (outcome = 'dead_letter' AND reason = ANY ($3))
    AND NOT EXISTS (SELECT FROM decuwatch.dead_letters d
        WHERE d.stream = i.stream AND d.sequence = i.sequence AND d.digest = i.digest)
ORDER BY source, event_id, model
ON CONFLICT DO NOTHING
RETURNING source, event_id, model, EXISTS (SELECT FROM decuwatch.canaries c
    WHERE c.source = e.source AND c.event_id = e.event_id AND c.model = e.model)

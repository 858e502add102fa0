SELECT d.id, d.recorded_at, d.kind, d.field, d.reason, coalesce(d.model, ''), coalesce(d.source, ''),
    coalesce(d.event_id, ''), d.event_time, d.subject, d.stream, d.sequence, d.delivered, d.payload_state,
    coalesce(d.payload_size, octet_length(d.payload)), CASE WHEN $1 > 0 THEN d.payload END, r.published_as,
    coalesce(e.outcome, ''), coalesce(e.reason, '')
FROM decuwatch.dead_letters d
LEFT JOIN decuwatch.redeliveries r ON r.dead_letter = d.id
LEFT JOIN decuwatch.events e ON e.source = d.source AND e.event_id = d.event_id AND e.model = d.model
WHERE ($1::bigint = 0 OR d.id = $1) AND ($2 = '' OR d.model = $2) AND ($3 = '' OR d.source = $3)
    AND (cardinality($4::text[]) = 0 OR d.kind = ANY ($4))
ORDER BY d.id DESC LIMIT $5

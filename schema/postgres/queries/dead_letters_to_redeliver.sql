SELECT d.id, d.recorded_at, d.stream, d.sequence, d.digest, coalesce(d.source, ''), coalesce(d.event_id, ''),
    coalesce(d.model, ''), d.subject, d.kind, d.reason, d.payload, d.payload_state
FROM decuwatch.dead_letters d LEFT JOIN decuwatch.redeliveries r ON r.dead_letter = d.id
WHERE d.id > $1 AND d.stream = $2 AND r.published_as IS NULL AND ($3 = '' OR d.model = $3)
    AND (cardinality($4::text[]) = 0 OR d.kind = ANY ($4))
    AND d.sequence >= $5 AND ($6::bigint = 0 OR d.sequence <= $6)
    AND (cardinality($7::bigint[]) = 0 OR d.id = ANY ($7))
ORDER BY d.id LIMIT $8

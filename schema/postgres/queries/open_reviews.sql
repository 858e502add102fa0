WITH opened AS (
    INSERT INTO decuwatch.reviews (id, kind, alert_id, source, event_id, event_time, model, ensemble_digest,
        class_index, class_label, labels, measured)
    SELECT id, kind, alert_id, source, event_id, event_time, model, ensemble_digest, class_index, class_label, labels,
        measured
    FROM json_populate_recordset(NULL::decuwatch.reviews, $1) i
    WHERE NOT EXISTS (SELECT FROM decuwatch.canaries c
        WHERE c.source = i.source AND c.event_id = i.event_id AND c.model = i.model)
    ON CONFLICT DO NOTHING
    RETURNING id
)
INSERT INTO decuwatch.evidence_jobs (review_id) SELECT id FROM opened ON CONFLICT DO NOTHING

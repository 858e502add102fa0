-- +goose Up
CREATE VIEW decuwatch.production_scores AS
SELECT s.* FROM decuwatch.scores s
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model
);
COMMENT ON VIEW decuwatch.production_scores IS 'Scores without those of canaries: what statistics are made of';

CREATE VIEW decuwatch.production_alerts AS
SELECT a.* FROM decuwatch.alerts a
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = a.source AND c.event_id = a.event_id AND c.model = a.model
);
COMMENT ON VIEW decuwatch.production_alerts IS 'Alerts without those on canaries: what statistics are made of';

CREATE VIEW decuwatch.review_list AS
SELECT r.id, r.kind, coalesce(r.alert_id, '') AS alert_id, r.source, r.event_id, r.event_time, r.model,
    r.ensemble_digest, r.class_index, r.class_label, r.state, coalesce(r.verdict, '') AS verdict, r.assignee, r.version,
    r.opened_at, r.updated_at, r.resolved_at,
    coalesce(a.severity, '') AS severity, coalesce(a.reason, '') AS reason, coalesce(a.measurement, '') AS measurement,
    coalesce(j.state, '') AS evidence, coalesce(j.attempts, 0) AS evidence_attempts,
    coalesce(j.last_error, '') AS evidence_error
FROM decuwatch.reviews r
LEFT JOIN decuwatch.alerts a ON a.id = r.alert_id
LEFT JOIN decuwatch.evidence_jobs j ON j.review_id = r.id;
COMMENT ON VIEW decuwatch.review_list IS 'Reviews with their alert and the state of their evidence; empty texts instead of NULL';

-- Columns mean what they mean in their tables.
-- +goose StatementBegin
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN
        SELECT v.relname AS view, va.attname AS column, col_description(t.oid, ta.attnum) AS comment
        FROM (VALUES ('production_scores', 'scores'), ('production_alerts', 'alerts'), ('review_list', 'reviews'))
            x (view, source)
        JOIN pg_class v ON v.relname = x.view AND v.relnamespace = 'decuwatch'::regnamespace
        JOIN pg_class t ON t.relname = x.source AND t.relnamespace = 'decuwatch'::regnamespace
        JOIN pg_attribute va ON va.attrelid = v.oid AND va.attnum > 0
        JOIN pg_attribute ta ON ta.attrelid = t.oid AND ta.attname = va.attname
    LOOP
        EXECUTE format('COMMENT ON COLUMN decuwatch.%I.%I IS %L', c.view, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd
COMMENT ON COLUMN decuwatch.review_list.severity IS 'Severity of the alert; empty for a sample';
COMMENT ON COLUMN decuwatch.review_list.reason IS 'Reason of the alert; empty for a sample';
COMMENT ON COLUMN decuwatch.review_list.measurement IS 'Measurement of the alert; empty for a sample';
COMMENT ON COLUMN decuwatch.review_list.evidence IS 'State of the evidence job; empty without one';
COMMENT ON COLUMN decuwatch.review_list.evidence_attempts IS 'Attempts to make the evidence';
COMMENT ON COLUMN decuwatch.review_list.evidence_error IS 'Why the last attempt failed';

GRANT SELECT ON decuwatch.production_scores, decuwatch.production_alerts, decuwatch.review_list TO decuwatch_writer;

-- +goose Down
DROP VIEW decuwatch.review_list, decuwatch.production_alerts, decuwatch.production_scores;

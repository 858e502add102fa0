-- +goose Up
CREATE VIEW decuwatch_views.production_scores AS
SELECT s.* FROM decuwatch_views.scores s
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model
);
COMMENT ON VIEW decuwatch_views.production_scores IS 'Scores without those of canaries: ask it for statistics';

CREATE VIEW decuwatch_views.production_alerts AS
SELECT a.* FROM decuwatch_views.alerts a
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = a.source AND c.event_id = a.event_id AND c.model = a.model
);
COMMENT ON VIEW decuwatch_views.production_alerts IS 'Alerts without those on canaries: ask it for statistics';

-- Columns mean what they mean in the views with the canaries.
-- +goose StatementBegin
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN
        SELECT v.relname AS view, va.attname AS column, col_description(t.oid, ta.attnum) AS comment
        FROM pg_class v
        JOIN pg_class t ON 'production_' || t.relname = v.relname AND t.relnamespace = v.relnamespace
        JOIN pg_attribute va ON va.attrelid = v.oid AND va.attnum > 0
        JOIN pg_attribute ta ON ta.attrelid = t.oid AND ta.attname = va.attname
        WHERE v.relnamespace = 'decuwatch_views'::regnamespace
    LOOP
        EXECUTE format('COMMENT ON COLUMN decuwatch_views.%I.%I IS %L', c.view, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd

GRANT SELECT ON decuwatch_views.production_scores, decuwatch_views.production_alerts
TO decuwatch_reader, decuwatch_writer;

-- +goose Down
DROP VIEW decuwatch_views.production_alerts, decuwatch_views.production_scores;

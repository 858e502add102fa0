-- +goose Up
-- What the events of a model cost, shared by the workers. A bucket holds the rows of an hour, or of a day, and refills evenly:
-- the rows that were taken from it are forgotten at the rate at which it refills.
CREATE TABLE decuwatch.budgets (
    model      text NOT NULL PRIMARY KEY CHECK (length(model) BETWEEN 1 AND 64),
    hour_rows  decuwatch.finite NOT NULL DEFAULT 0 CHECK (hour_rows >= 0),
    day_rows   decuwatch.finite NOT NULL DEFAULT 0 CHECK (day_rows >= 0),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE decuwatch.budgets IS
    'Row budgets of models as token buckets: how many rows are missing from the bucket of an hour and of a day. The sizes are settings of the workers';
COMMENT ON COLUMN decuwatch.budgets.model IS 'Model';
COMMENT ON COLUMN decuwatch.budgets.hour_rows IS 'Rows missing from the bucket of an hour when the row was written; 0 without such a budget';
COMMENT ON COLUMN decuwatch.budgets.day_rows IS 'Rows missing from the bucket of a day when the row was written; 0 without such a budget';
COMMENT ON COLUMN decuwatch.budgets.updated_at IS 'When the row was last written';

CREATE TABLE decuwatch.shares (
    model  text NOT NULL CHECK (length(model) BETWEEN 1 AND 64),
    at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    share  decuwatch.finite NOT NULL CHECK (share > 0 AND share <= 1),
    reason text NOT NULL CHECK (length(reason) BETWEEN 1 AND 400),
    PRIMARY KEY (model, at)
);
CREATE INDEX shares_by_time ON decuwatch.shares (at);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.shares FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.shares IS
    'Every change of the share of a model''s events that is scored because of its budget or of its backlog. The share of the sampling rules is multiplied with it. The newest row is in force; without one, the share is 1';
COMMENT ON COLUMN decuwatch.shares.model IS 'Model';
COMMENT ON COLUMN decuwatch.shares.at IS 'Since when it is in force';
COMMENT ON COLUMN decuwatch.shares.share IS 'Share of the events that the rules select';
COMMENT ON COLUMN decuwatch.shares.reason IS 'Why it changed';

GRANT SELECT, INSERT, UPDATE (hour_rows, day_rows, updated_at) ON decuwatch.budgets TO decuwatch_writer;
GRANT SELECT, INSERT ON decuwatch.shares TO decuwatch_writer;

CREATE VIEW decuwatch_views.budgets AS
SELECT model, hour_rows::double precision AS hour_rows, day_rows::double precision AS day_rows, updated_at
FROM decuwatch.budgets;
COMMENT ON VIEW decuwatch_views.budgets IS 'Rows that are missing from the buckets of each model''s budget';
CREATE VIEW decuwatch_views.shares AS
SELECT model, at, lead(at) OVER (PARTITION BY model ORDER BY at) AS until, share::double precision AS share, reason
FROM decuwatch.shares;
COMMENT ON VIEW decuwatch_views.shares IS
    'Shares of a model''s events that were scored because of its budget or of its backlog, one row for each change';
-- +goose StatementBegin
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN
        SELECT t.relname AS name, attname AS column, col_description(attrelid, attnum) AS comment
        FROM pg_attribute JOIN pg_class t ON t.oid = attrelid
        WHERE t.oid IN ('decuwatch.budgets'::regclass, 'decuwatch.shares'::regclass) AND attnum > 0
    LOOP
        EXECUTE format('COMMENT ON COLUMN decuwatch_views.%I.%I IS %L', c.name, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd
COMMENT ON COLUMN decuwatch_views.shares.until IS 'Until when it was in force; NULL if it is in force now';
GRANT SELECT ON decuwatch_views.budgets, decuwatch_views.shares TO decuwatch_reader, decuwatch_writer;

-- Old changes of shares go with the ledger.
-- +goose StatementBegin
DO $$
DECLARE
    before text := pg_get_functiondef('decuwatch.delete_old'::regproc);
    after  text := replace(before, '(''events'', ''tries'', ''tried_at''),',
        '(''events'', ''tries'', ''tried_at''), (''events'', ''shares'', ''at''),');
BEGIN
    ASSERT before <> after, 'delete_old lists the tables in another way';
    EXECUTE after;
END $$;
-- +goose StatementEnd

-- +goose Down
DROP VIEW decuwatch_views.shares, decuwatch_views.budgets;
DROP TABLE decuwatch.shares;
DROP TABLE decuwatch.budgets;

-- +goose Up
CREATE TABLE decuwatch.silences (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    model       text NOT NULL CHECK (model <> ''),
    class_index integer CHECK (class_index >= 0),
    class_label text NOT NULL DEFAULT '',
    measurement text,
    starts_at   timestamptz NOT NULL,
    ends_at     timestamptz NOT NULL CHECK (ends_at > starts_at),
    author      text NOT NULL CHECK (author <> ''),
    reason      text NOT NULL CHECK (reason <> '' AND length(reason) <= 4000),
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_by    text CHECK (ended_by <> ''),
    ended_at    timestamptz CHECK ((ended_by IS NULL) = (ended_at IS NULL))
);
CREATE INDEX silences_by_end ON decuwatch.silences (ends_at);
COMMENT ON TABLE decuwatch.silences IS 'Alerts that are stored and counted, but not sent, for a time. A silence is never changed or deleted, only ended early';
COMMENT ON COLUMN decuwatch.silences.id IS 'Number of the silence';
COMMENT ON COLUMN decuwatch.silences.model IS 'Model';
COMMENT ON COLUMN decuwatch.silences.class_index IS 'Class; NULL for every class of the model';
COMMENT ON COLUMN decuwatch.silences.class_label IS 'Label of the class when the silence was made; empty for every class';
COMMENT ON COLUMN decuwatch.silences.measurement IS 'Measurement; NULL for every measurement';
COMMENT ON COLUMN decuwatch.silences.starts_at IS 'When it begins';
COMMENT ON COLUMN decuwatch.silences.ends_at IS 'When it ends by itself';
COMMENT ON COLUMN decuwatch.silences.author IS 'Who made it';
COMMENT ON COLUMN decuwatch.silences.reason IS 'Why';
COMMENT ON COLUMN decuwatch.silences.created_at IS 'When it was made';
COMMENT ON COLUMN decuwatch.silences.ended_by IS 'Who ended it early; NULL if nobody did';
COMMENT ON COLUMN decuwatch.silences.ended_at IS 'When it was ended early; NULL if it was not';
GRANT SELECT, INSERT ON decuwatch.silences TO decuwatch_writer;
GRANT UPDATE (ended_by, ended_at) ON decuwatch.silences TO decuwatch_writer;

ALTER TABLE decuwatch.alerts
    ADD COLUMN silence_id bigint REFERENCES decuwatch.silences,
    DROP CONSTRAINT alerts_delivery_check,
    ADD CONSTRAINT alerts_delivery_check
        CHECK (delivery IN ('owed', 'class_budget', 'model_budget', 'cool_down', 'silenced')),
    ADD CHECK ((delivery = 'silenced') = (silence_id IS NOT NULL));
CREATE INDEX alerts_silenced ON decuwatch.alerts (silence_id) WHERE silence_id IS NOT NULL;
COMMENT ON COLUMN decuwatch.alerts.silence_id IS 'The silence that kept it from being sent; NULL without one';
COMMENT ON COLUMN decuwatch.alerts.delivery IS
    'owed: it went to the outbox; else why not: class_budget, model_budget, cool_down or silenced. A summary counts those of an hour, except the silenced ones';

CREATE VIEW decuwatch_views.silences AS
SELECT id, model, class_index, class_label, measurement, starts_at, ends_at, author, reason, created_at, ended_by,
    ended_at, starts_at <= now() AND now() < coalesce(ended_at, ends_at) AS in_force,
    (SELECT count(*) FROM decuwatch.alerts a WHERE a.silence_id = s.id) AS silenced
FROM decuwatch.silences s;
COMMENT ON VIEW decuwatch_views.silences IS 'Silences, past and present: whose, why, until when, and how many alerts each kept from being sent';
-- +goose StatementBegin
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN
        SELECT attname AS column, col_description(attrelid, attnum) AS comment
        FROM pg_attribute WHERE attrelid = 'decuwatch.silences'::regclass AND attnum > 0 AND NOT attisdropped
    LOOP
        EXECUTE format('COMMENT ON COLUMN decuwatch_views.silences.%I IS %L', c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd
COMMENT ON COLUMN decuwatch_views.silences.in_force IS 'It silences alerts now';
COMMENT ON COLUMN decuwatch_views.silences.silenced IS 'Alerts that it kept from being sent';
GRANT SELECT ON decuwatch_views.silences TO decuwatch_reader, decuwatch_writer;

-- An alert is owed for as long as a sink has not taken it.
-- +goose StatementBegin
DO $$
DECLARE
    before text := pg_get_viewdef('decuwatch_views.alerts');
    after  text := replace(before, 'a.delivery,', 'CASE WHEN a.delivery = ''owed'' AND NOT EXISTS (SELECT FROM '
        'decuwatch.outbox o WHERE o.message_id = a.id AND o.delivered_at IS NULL) THEN ''sent'' ELSE a.delivery END AS '
        'delivery,');
BEGIN
    ASSERT before <> after, 'the view of alerts shows the delivery in another way';
    EXECUTE 'CREATE OR REPLACE VIEW decuwatch_views.alerts AS ' || after;
END $$;
-- +goose StatementEnd
COMMENT ON COLUMN decuwatch_views.alerts.delivery IS
    'sent: every sink took it; owed: a sink still has to; else why it was not sent: class_budget, model_budget, cool_down or silenced';
COMMENT ON COLUMN decuwatch_views.production_alerts.delivery IS
    'sent: every sink took it; owed: a sink still has to; else why it was not sent: class_budget, model_budget, cool_down or silenced';

-- +goose Down
-- +goose StatementBegin
DO $$
DECLARE
    before text := pg_get_viewdef('decuwatch_views.alerts');
    after  text := regexp_replace(before, 'CASE\s+WHEN \(\(a\.delivery = ''owed''.*?END AS delivery,', 'a.delivery,');
BEGIN
    ASSERT before <> after, 'the view of alerts shows the delivery in another way';
    EXECUTE 'CREATE OR REPLACE VIEW decuwatch_views.alerts AS ' || after;
END $$;
-- +goose StatementEnd
DROP VIEW decuwatch_views.silences;
DROP INDEX decuwatch.alerts_silenced;
ALTER TABLE decuwatch.alerts DROP COLUMN silence_id, DROP CONSTRAINT alerts_delivery_check;
UPDATE decuwatch.alerts SET delivery = 'cool_down' WHERE delivery = 'silenced';
ALTER TABLE decuwatch.alerts ADD CONSTRAINT alerts_delivery_check
    CHECK (delivery IN ('owed', 'class_budget', 'model_budget', 'cool_down'));
DROP TABLE decuwatch.silences;

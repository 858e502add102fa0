-- +goose Up
-- Scores beside the verdicts: by a shadow ensemble, or by a re-score. They have a table of their own, so that whatever reads
-- scores still finds each event once, and neither the key nor the indexes of scores change.
CREATE TABLE decuwatch.rescores (
    LIKE decuwatch.scores INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING COMMENTS,
    purpose text NOT NULL CHECK (purpose IN ('shadow', 'rescore')),
    PRIMARY KEY (event_time, source, event_id, ensemble_digest, settings)
) PARTITION BY RANGE (event_time);
CREATE INDEX rescores_by_series ON decuwatch.rescores (model, ensemble_digest, class_index, event_time DESC);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.rescores
    FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.rescores IS
    'Scores of events beside their verdicts, by a shadow ensemble or a re-score: one for each event, ensemble and settings. Its columns are those of scores and purpose. Append-only, one partition a month of event time';
COMMENT ON COLUMN decuwatch.rescores.purpose IS 'Why it was made: shadow (of live traffic) or rescore (somebody asked for it)';

CREATE TABLE decuwatch.rescore_failures (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run             text NOT NULL CHECK (run <> ''),
    source          text NOT NULL,
    event_id        text NOT NULL,
    event_time      timestamptz NOT NULL,
    model           text NOT NULL,
    ensemble_digest decuwatch.digest NOT NULL,
    kind            text NOT NULL CHECK (kind ~ '^[a-z0-9_]{1,64}$'),
    reason          text NOT NULL CHECK (reason <> ''),
    recorded_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX rescore_failures_by_run ON decuwatch.rescore_failures (run);
CREATE INDEX rescore_failures_by_recording ON decuwatch.rescore_failures (recorded_at);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.rescore_failures
    FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.rescore_failures IS 'Events that a re-score or a shadow ensemble could not score, with the reason. Asked for again, they are tried again';
COMMENT ON COLUMN decuwatch.rescore_failures.id IS 'Number of the row';
COMMENT ON COLUMN decuwatch.rescore_failures.run IS 'The run of decuwatch rescore, or shadow';
COMMENT ON COLUMN decuwatch.rescore_failures.source IS 'CloudEvents source of the event';
COMMENT ON COLUMN decuwatch.rescore_failures.event_id IS 'CloudEvents id of the event';
COMMENT ON COLUMN decuwatch.rescore_failures.event_time IS 'When the producer generated, from the event';
COMMENT ON COLUMN decuwatch.rescore_failures.model IS 'Model that the event names';
COMMENT ON COLUMN decuwatch.rescore_failures.ensemble_digest IS 'Ensemble that should have scored it';
COMMENT ON COLUMN decuwatch.rescore_failures.kind IS 'What is wrong: unknown_class, non_finite, gone (retention dropped the score it is made from) or failed';
COMMENT ON COLUMN decuwatch.rescore_failures.reason IS 'What is wrong, in words';
COMMENT ON COLUMN decuwatch.rescore_failures.recorded_at IS 'When the row was written';

CREATE TABLE decuwatch.shadow_positions (
    model           text NOT NULL CHECK (length(model) BETWEEN 1 AND 64),
    ensemble_digest decuwatch.digest NOT NULL,
    position        timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (model, ensemble_digest)
);
COMMENT ON TABLE decuwatch.shadow_positions IS 'Up to where the verdicts on a model were given to a shadow ensemble';
COMMENT ON COLUMN decuwatch.shadow_positions.model IS 'Model';
COMMENT ON COLUMN decuwatch.shadow_positions.ensemble_digest IS 'The shadow ensemble';
COMMENT ON COLUMN decuwatch.shadow_positions.position IS 'Verdicts that were recorded before this moment were given to it';

ALTER TABLE decuwatch.workers ADD COLUMN shadows text[] NOT NULL DEFAULT '{}';
COMMENT ON COLUMN decuwatch.workers.shadows IS 'Digests of the ensembles that it serves as shadows of the model''s ensemble';

-- Partitions of both tables come and go together.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION decuwatch.ensure_partition(moment timestamptz) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    month  timestamptz := date_trunc('month', moment, 'UTC');
    suffix text := to_char(month, '_YYYY_MM');
    parent text;
    made   boolean := false;
BEGIN
    IF month IS NULL OR month < '2019-12-01' OR month > now() + interval '1 year' THEN
        RAISE EXCEPTION 'no partition for %: scores lie between 2020 and a year from now', coalesce(moment::text, 'NULL')
            USING ERRCODE = 'check_violation';
    END IF;
    IF to_regclass(format('decuwatch.%I', 'scores' || suffix)) IS NOT NULL
        AND to_regclass(format('decuwatch.%I', 'rescores' || suffix)) IS NOT NULL THEN
        RETURN false;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('decuwatch.ensure_partition'));
    FOREACH parent IN ARRAY ARRAY['scores', 'rescores'] LOOP
        -- Not to_regclass: its cache may still say what was true before the lock.
        CONTINUE WHEN EXISTS (
            SELECT FROM pg_class WHERE relnamespace = 'decuwatch'::regnamespace AND relname = parent || suffix);
        -- LIKE copies the columns' comments, which PARTITION OF would not; ATTACH locks the table less than PARTITION OF.
        EXECUTE format('CREATE TABLE decuwatch.%I (LIKE decuwatch.%I INCLUDING ALL)', parent || suffix, parent);
        EXECUTE format('COMMENT ON TABLE decuwatch.%I IS %L', parent || suffix,
            format('Scores of %s, a partition of %s', to_char(month, 'YYYY-MM'), parent));
        EXECUTE format('ALTER TABLE decuwatch.%I ATTACH PARTITION decuwatch.%I FOR VALUES FROM (%L) TO (%L)',
            parent, parent || suffix, month, month + interval '1 month');
        made := true;
    END LOOP;
    RETURN made;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION decuwatch.drop_old_scores(keep interval) RETURNS text[]
    -- A drop waits for queries on the table, and writers wait for the drop: rather try again later.
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET lock_timeout = '500ms' AS $$
DECLARE
    -- A day more than what a score's event may be old when it is written: no score is dropped right after it was written.
    before    timestamptz := now() - decuwatch.check_retention('scores', keep) - interval '1 day';
    partition text;
    dropped   text[] := '{}';
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('decuwatch.ensure_partition'));
    FOR partition IN
        SELECT c.oid::regclass::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent IN ('decuwatch.scores'::regclass, 'decuwatch.rescores'::regclass)
          AND c.relname ~ '^(re)?scores_[0-9]{4}_[0-9]{2}$'
          AND to_timestamp(right(c.relname, 7), 'YYYY_MM') + interval '1 month' <= before
        ORDER BY right(c.relname, 7), c.relname
    LOOP
        EXECUTE format('DROP TABLE %s', partition);
        dropped := dropped || partition;
    END LOOP;
    DELETE FROM decuwatch.rescore_failures WHERE recorded_at < before;
    RETURN dropped;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.drop_old_scores IS
    'Drops the partitions of scores and rescores whose month ended longer ago than a retention and a day, and returns their names. Failures of re-scores go with them';

SELECT decuwatch.ensure_partition(
    make_timestamptz(substr(right(c.relname, 7), 1, 4)::integer, right(c.relname, 2)::integer, 1, 0, 0, 0, 'UTC'))
FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'decuwatch.scores'::regclass AND c.relname ~ '^scores_[0-9]{4}_[0-9]{2}$';

-- The columns of the views follow from those that they show.
-- +goose StatementBegin
DO $$
DECLARE
    columns text;
BEGIN
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO columns FROM pg_catalog.pg_attribute
    WHERE attrelid = 'decuwatch.production_scores'::regclass AND attnum > 0 AND NOT attisdropped;
    EXECUTE format('
        CREATE VIEW decuwatch.series_scores AS
        SELECT ''live'' AS purpose, %1$s FROM decuwatch.production_scores
        UNION ALL
        SELECT purpose, %1$s FROM decuwatch.rescores r
        WHERE NOT EXISTS (
            SELECT FROM decuwatch.canaries c WHERE c.source = r.source AND c.event_id = r.event_id AND c.model = r.model
        ) AND NOT EXISTS (
            SELECT FROM decuwatch.scores s WHERE s.event_time = r.event_time AND s.source = r.source
                AND s.event_id = r.event_id AND s.ensemble_digest = r.ensemble_digest AND s.settings = r.settings
        )', columns);
    SELECT string_agg(format('%1$I::%2$s AS %1$I', attname, format_type(atttypid, atttypmod)), ', ' ORDER BY attnum)
    INTO columns FROM pg_catalog.pg_attribute
    WHERE attrelid = 'decuwatch_views.scores'::regclass AND attnum > 0 AND NOT attisdropped;
    EXECUTE format('
        CREATE VIEW decuwatch_views.all_scores AS
        SELECT ''live'' AS purpose, %1$s FROM decuwatch_views.scores
        UNION ALL
        SELECT purpose, %1$s FROM decuwatch.rescores', columns);
END $$;
-- +goose StatementEnd
COMMENT ON VIEW decuwatch.series_scores IS
    'The scores of each series, live or not, without those of canaries: each event of a series once. Thresholds are calibrated from them, and ensembles compared by them';
COMMENT ON VIEW decuwatch_views.all_scores IS
    'The live scores, and those of shadow ensembles and re-scores: an event has one row for each ensemble and settings that scored it. Ask scores for statistics';

-- The measurements of a score are read as production_measurements reads them.
-- +goose StatementBegin
DO $$
BEGIN
    EXECUTE 'CREATE VIEW decuwatch.series_measurements AS ' || regexp_replace(
        pg_catalog.pg_get_viewdef('decuwatch.production_measurements'::regclass),
        '(decuwatch\.)?production_scores', 'decuwatch.series_scores', 'g');
END $$;
-- +goose StatementEnd
COMMENT ON VIEW decuwatch.series_measurements IS
    'The measurements of the scores in series_scores, one row for each. What was not measured has no row';
CREATE VIEW decuwatch_views.rescore_failures AS
SELECT run, source, event_id, event_time, model, ensemble_digest, kind, reason, recorded_at
FROM decuwatch.rescore_failures;
COMMENT ON VIEW decuwatch_views.rescore_failures IS 'Events that a re-score or a shadow ensemble could not score, with the reason';

-- A column of a view means what the column of the table means that it comes from.
-- +goose StatementBegin
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN
        SELECT v.oid::regclass AS view, va.attname AS column, pg_catalog.col_description(t.oid, ta.attnum) AS comment
        FROM (VALUES ('decuwatch.series_scores', 'decuwatch.rescores'),
            ('decuwatch.series_measurements', 'decuwatch.production_measurements'),
            ('decuwatch_views.all_scores', 'decuwatch.rescores'),
            ('decuwatch_views.rescore_failures', 'decuwatch.rescore_failures')) x (view, source)
        JOIN pg_catalog.pg_class v ON v.oid = x.view::regclass
        JOIN pg_catalog.pg_class t ON t.oid = x.source::regclass
        JOIN pg_catalog.pg_attribute va ON va.attrelid = v.oid AND va.attnum > 0
        JOIN pg_catalog.pg_attribute ta ON ta.attrelid = t.oid AND ta.attname = va.attname
        WHERE pg_catalog.col_description(v.oid, va.attnum) IS NULL
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', c.view, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd
COMMENT ON COLUMN decuwatch.series_scores.purpose IS 'live (the verdict), shadow or rescore';
COMMENT ON COLUMN decuwatch_views.all_scores.purpose IS
    'Why it was made: live (the verdict), shadow (by a shadow ensemble) or rescore (somebody asked for it)';

GRANT SELECT, INSERT ON decuwatch.rescores, decuwatch.rescore_failures TO decuwatch_writer;
GRANT SELECT, INSERT, UPDATE (position) ON decuwatch.shadow_positions TO decuwatch_writer;
GRANT SELECT ON decuwatch.series_scores, decuwatch.series_measurements TO decuwatch_writer;
GRANT SELECT ON decuwatch_views.all_scores, decuwatch_views.rescore_failures TO decuwatch_reader, decuwatch_writer;

-- +goose Down
-- Columns of older tables go with these: migrations are only taken back all together.
DROP VIEW decuwatch_views.rescore_failures, decuwatch_views.all_scores;
DROP VIEW decuwatch.series_measurements, decuwatch.series_scores;
DROP TABLE decuwatch.shadow_positions, decuwatch.rescore_failures, decuwatch.rescores;

-- +goose Up
-- Retention and folding run as the owner, on the server's clock, with a shortest time that no caller gets below. The
-- writer deletes nothing by itself from here on. Their search_path names pg_temp, and names it last: left out, it would
-- come first, and a caller's temporary table named pg_class would be read instead of the catalog.

-- +goose StatementBegin
DO $$
BEGIN
    IF to_regclass('decuwatch.class_day_parts') IS NULL OR to_regclass('decuwatch.evidence_jobs') IS NULL THEN
        RAISE EXCEPTION 'these tables were made by an unreleased build, whose migrations had the same numbers and other contents'
            USING HINT = 'Save what you need, then run: decuwatch migrate down --yes, and decuwatch migrate';
    END IF;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION decuwatch.least_retention(kind text) RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE kind
        WHEN 'scores' THEN interval '30 days'
        WHEN 'events' THEN interval '30 days'
        WHEN 'alerts' THEN interval '30 days'
        WHEN 'rollups' THEN interval '30 days'
        WHEN 'payloads' THEN interval '1 day'
        WHEN 'deliveries' THEN interval '1 day'
        WHEN 'evidence' THEN interval '1 hour'
    END;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.least_retention IS
    'Shortest retention of a kind of data: nobody but the owner can delete what is younger; NULL if there is no such kind';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.check_retention(kind text, keep interval) RETURNS interval
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    least_keep interval := decuwatch.least_retention(kind);
BEGIN
    IF least_keep IS NULL THEN
        RAISE EXCEPTION 'there is no retention of %', coalesce(kind, 'NULL') USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- Years and months are days of a calendar here: what counts is the moment that results.
    IF keep IS NULL OR NOT (now() - keep <= now() - least_keep) THEN
        RAISE EXCEPTION 'retention of % is %, must be at least %', kind, coalesce(keep::text, 'NULL'), least_keep
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN keep;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.check_retention IS 'Returns a retention unchanged, or fails if it is shorter than least_retention';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.delete_old(kind text, keep interval) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    most    CONSTANT integer := 10000;
    before  timestamptz := now() - decuwatch.check_retention(kind, keep);
    old     record;
    n       bigint;
    deleted bigint := 0;
BEGIN
    FOR old IN
        SELECT r.name, r.age FROM (VALUES
            ('evidence', 'evidence', 'made_at'),
            ('deliveries', 'outbox', 'delivered_at'),
            ('alerts', 'alerts', 'recorded_at'),
            ('alerts', 'reviews', 'opened_at'),
            ('alerts', 'canaries', 'published_at'),
            ('events', 'events', 'recorded_at'),
            ('events', 'skips', 'recorded_at'),
            ('events', 'dead_letters', 'recorded_at'),
            ('events', 'repeats', 'recorded_at'),
            ('events', 'tries', 'tried_at'),
            ('events', 'redeliveries', 'requested_at'),
            ('rollups', 'class_hour_parts', 'hour'),
            ('rollups', 'class_day_parts', 'day'),
            ('rollups', 'outcome_hour_parts', 'hour')
        ) r (kind, name, age) WHERE r.kind = delete_old.kind
    LOOP
        EXECUTE format('DELETE FROM decuwatch.%1$I WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM decuwatch.%1$I WHERE %2$I < $1 LIMIT $2))', old.name, old.age) USING before, most - deleted;
        GET DIAGNOSTICS n = ROW_COUNT;
        deleted := deleted + n;
    END LOOP;
    RETURN deleted;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.delete_old IS
    'Deletes rows of a kind (events, alerts, evidence, deliveries, rollups) that are older than a retention, at most 10,000 of them, and returns how many; 0 when it is done';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.drop_old_scores(keep interval) RETURNS text[]
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
        WHERE i.inhparent = 'decuwatch.scores'::regclass AND c.relname ~ '^scores_[0-9]{4}_[0-9]{2}$'
          AND to_timestamp(substring(c.relname FROM 8), 'YYYY_MM') + interval '1 month' <= before
        ORDER BY c.relname
    LOOP
        EXECUTE format('DROP TABLE %s', partition);
        dropped := dropped || partition;
    END LOOP;
    RETURN dropped;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.drop_old_scores IS
    'Drops the partitions of scores whose month ended longer ago than a retention and a day, and returns their names';

DROP FUNCTION decuwatch.drop_partitions;

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION decuwatch.ensure_partition(moment timestamptz) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    month   timestamptz := date_trunc('month', moment, 'UTC');
    name    text := 'scores_' || to_char(month, 'YYYY_MM');
BEGIN
    IF month IS NULL OR month < '2019-12-01' OR month > now() + interval '1 year' THEN
        RAISE EXCEPTION 'no partition for %: scores lie between 2020 and a year from now', coalesce(moment::text, 'NULL')
            USING ERRCODE = 'check_violation';
    END IF;
    IF to_regclass(format('decuwatch.%I', name)) IS NOT NULL THEN
        RETURN false;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('decuwatch.ensure_partition'));
    -- Not to_regclass: its cache may still say what was true before the lock.
    IF EXISTS (SELECT FROM pg_class WHERE relnamespace = 'decuwatch'::regnamespace AND relname = name) THEN
        RETURN false;
    END IF;
    -- LIKE copies the columns' comments, which PARTITION OF would not; ATTACH locks the table less than PARTITION OF.
    EXECUTE format('CREATE TABLE decuwatch.%I (LIKE decuwatch.scores INCLUDING ALL)', name);
    EXECUTE format('COMMENT ON TABLE decuwatch.%I IS %L', name, 'Scores of ' || to_char(month, 'YYYY-MM') || ', a partition of scores');
    EXECUTE format('ALTER TABLE decuwatch.scores ATTACH PARTITION decuwatch.%I FOR VALUES FROM (%L) TO (%L)', name, month, month + interval '1 month');
    RETURN true;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION decuwatch.fold() RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    sums record;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('decuwatch.fold')) THEN
        RETURN false;
    END IF;
    FOR sums IN SELECT * FROM (VALUES ('class_hour_parts', 'hour'), ('class_day_parts', 'day')) t (name, span) LOOP
        EXECUTE format('
            WITH keys AS (
                SELECT DISTINCT %2$I, model, ensemble_digest, settings, class_index FROM decuwatch.%1$I WHERE NOT folded
            ), gone AS (
                DELETE FROM decuwatch.%1$I p USING keys k
                WHERE (p.%2$I, p.model, p.ensemble_digest, p.settings, p.class_index)
                    = (k.%2$I, k.model, k.ensemble_digest, k.settings, k.class_index)
                RETURNING p.*
            )
            INSERT INTO decuwatch.%1$I (%2$I, model, ensemble_digest, settings, class_index, class_label, n,
                class_gap_sum, class_gap_squares, class_gap_min, class_gap_max, class_gap_saturated,
                request_risk_sum, request_risk_squares, request_risk_min, request_risk_max, request_risk_saturated,
                warnings, criticals, folded)
            SELECT %2$I, model, ensemble_digest, settings, class_index, class_label, sum(n),
                sum(class_gap_sum), sum(class_gap_squares), min(class_gap_min), max(class_gap_max), sum(class_gap_saturated),
                sum(request_risk_sum), sum(request_risk_squares), min(request_risk_min), max(request_risk_max), sum(request_risk_saturated),
                sum(warnings), sum(criticals), true
            FROM gone GROUP BY %2$I, model, ensemble_digest, settings, class_index, class_label', sums.name, sums.span);
    END LOOP;
    WITH keys AS (
        SELECT DISTINCT hour, model, outcome, reason FROM decuwatch.outcome_hour_parts WHERE NOT folded
    ), gone AS (
        DELETE FROM decuwatch.outcome_hour_parts p USING keys k
        WHERE (p.hour, p.model, p.outcome, p.reason) = (k.hour, k.model, k.outcome, k.reason) RETURNING p.*
    )
    INSERT INTO decuwatch.outcome_hour_parts (hour, model, outcome, reason, n, folded)
    SELECT hour, model, outcome, reason, sum(n), true FROM gone GROUP BY hour, model, outcome, reason;
    RETURN true;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.fold IS
    'Folds the rows that commits added to the rollups into one row a key; false if another session is folding. What the views show does not change';

REVOKE DELETE ON decuwatch.events, decuwatch.skips, decuwatch.dead_letters, decuwatch.alerts, decuwatch.outbox,
    decuwatch.class_hour_parts, decuwatch.class_day_parts, decuwatch.outcome_hour_parts, decuwatch.reviews,
    decuwatch.review_history, decuwatch.evidence, decuwatch.evidence_jobs, decuwatch.canaries FROM decuwatch_writer;
REVOKE UPDATE ON decuwatch.outbox, decuwatch.reviews, decuwatch.evidence_jobs, decuwatch.canaries FROM decuwatch_writer;
GRANT UPDATE (attempts, next_attempt_at, last_error, delivered_at) ON decuwatch.outbox TO decuwatch_writer;
GRANT UPDATE (state, verdict, assignee, version, updated_at, resolved_at) ON decuwatch.reviews TO decuwatch_writer;
GRANT UPDATE (state, attempts, next_attempt_at, last_error, done_at) ON decuwatch.evidence_jobs TO decuwatch_writer;
GRANT UPDATE (outcome, decided_at) ON decuwatch.canaries TO decuwatch_writer;
REVOKE EXECUTE ON FUNCTION decuwatch.delete_old, decuwatch.drop_old_scores, decuwatch.fold FROM PUBLIC;
GRANT EXECUTE ON FUNCTION decuwatch.delete_old, decuwatch.drop_old_scores, decuwatch.fold TO decuwatch_writer;

-- +goose Down
REVOKE UPDATE (attempts, next_attempt_at, last_error, delivered_at) ON decuwatch.outbox FROM decuwatch_writer;
REVOKE UPDATE (state, verdict, assignee, version, updated_at, resolved_at) ON decuwatch.reviews FROM decuwatch_writer;
REVOKE UPDATE (state, attempts, next_attempt_at, last_error, done_at) ON decuwatch.evidence_jobs FROM decuwatch_writer;
REVOKE UPDATE (outcome, decided_at) ON decuwatch.canaries FROM decuwatch_writer;
GRANT UPDATE ON decuwatch.outbox, decuwatch.reviews, decuwatch.evidence_jobs, decuwatch.canaries TO decuwatch_writer;
GRANT DELETE ON decuwatch.events, decuwatch.skips, decuwatch.dead_letters, decuwatch.alerts, decuwatch.outbox,
    decuwatch.class_hour_parts, decuwatch.class_day_parts, decuwatch.outcome_hour_parts, decuwatch.reviews,
    decuwatch.review_history, decuwatch.evidence, decuwatch.evidence_jobs, decuwatch.canaries TO decuwatch_writer;
DROP FUNCTION decuwatch.fold;
DROP FUNCTION decuwatch.drop_old_scores;
DROP FUNCTION decuwatch.delete_old;
DROP FUNCTION decuwatch.check_retention;
DROP FUNCTION decuwatch.least_retention;
-- +goose StatementBegin
CREATE FUNCTION decuwatch.drop_partitions(before timestamptz) RETURNS text[]
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' SET timezone = 'UTC' SET lock_timeout = '500ms' AS $$
DECLARE
    partition text;
    dropped   text[] := '{}';
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('decuwatch.ensure_partition'));
    FOR partition IN
        SELECT c.oid::regclass::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'decuwatch.scores'::regclass AND c.relname ~ '^scores_[0-9]{4}_[0-9]{2}$'
          AND to_timestamp(substring(c.relname FROM 8), 'YYYY_MM') + interval '1 month' <= before
        ORDER BY c.relname
    LOOP
        EXECUTE format('DROP TABLE %s', partition);
        dropped := dropped || partition;
    END LOOP;
    RETURN dropped;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.drop_partitions IS 'Drops the partitions of scores that end at or before a moment and returns their names';
REVOKE EXECUTE ON FUNCTION decuwatch.drop_partitions FROM PUBLIC;
GRANT EXECUTE ON FUNCTION decuwatch.drop_partitions TO decuwatch_writer;

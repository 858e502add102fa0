-- +goose Up
-- Rows of the ledger that retention deletes took the knowledge with them up to where every message had its verdict: what they
-- stood for was then reported as lost, if no row older than 30 days was left.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION decuwatch.delete_old(kind text, keep interval) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    most    CONSTANT integer := 10000;
    before  timestamptz := now() - decuwatch.check_retention(kind, keep);
    old     record;
    n       bigint;
    deleted bigint := 0;
BEGIN
    IF kind = 'events' THEN -- what the ledger forgets is accounted for no more
        -- EXECUTE, and + 0, so that rows are found by their age: nearly all are younger.
        EXECUTE $q$UPDATE decuwatch.stream_positions p SET begun_at = o.sequence FROM (
            SELECT s.stream, s.created, greatest(
                (SELECT max(sequence + 0) FROM decuwatch.events WHERE stream = s.stream AND recorded_at >= s.created AND recorded_at < $1),
                (SELECT max(sequence + 0) FROM decuwatch.dead_letters WHERE stream = s.stream AND recorded_at >= s.created AND recorded_at < $1),
                (SELECT max(sequence + 0) FROM decuwatch.repeats WHERE stream = s.stream AND recorded_at >= s.created AND recorded_at < $1)
            ) AS sequence FROM decuwatch.stream_positions s
        ) o WHERE o.stream = p.stream AND o.created = p.created AND o.sequence > p.begun_at$q$ USING before;
    END IF;
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
COMMENT ON COLUMN decuwatch.stream_positions.begun_at IS
    'Sequence of the last message before the first that is accounted for: the stream began there, or the ledger forgot what was before';

-- +goose Down
COMMENT ON COLUMN decuwatch.stream_positions.begun_at IS 'Sequence of the last message before the first that is accounted for';
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION decuwatch.delete_old(kind text, keep interval) RETURNS bigint
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

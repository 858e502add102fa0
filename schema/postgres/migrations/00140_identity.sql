-- +goose Up
-- The model becomes part of an event's identity. Whoever may publish events of one model could take the source and id of an
-- event of another, whose own producer was then refused. Scores need no new key: theirs holds the ensemble's digest, and an
-- ensemble scores one model. Ids of alerts are derived from that digest too.
ALTER TABLE decuwatch.events DROP CONSTRAINT events_pkey, ADD PRIMARY KEY (source, event_id, model);
COMMENT ON TABLE decuwatch.events IS
    'The ledger: one row for each event that has its verdict. Its key makes the first verdict the only one, across scores, skips and dead letters. A dead letter of a message that no worker took (orphaned, unknown_model) is no verdict on its event';
COMMENT ON COLUMN decuwatch.events.model IS 'Model that the event names; source, id and model are the event''s identity';
ALTER TABLE decuwatch.skips DROP CONSTRAINT skips_pkey, ADD PRIMARY KEY (source, event_id, model);
COMMENT ON COLUMN decuwatch.skips.model IS 'Model that the event names; source, id and model are the event''s identity';
COMMENT ON COLUMN decuwatch_views.events.model IS 'Model that the event names; source, id and model are the event''s identity';
COMMENT ON COLUMN decuwatch_views.skips.model IS 'Model that the event names; source, id and model are the event''s identity';

ALTER TABLE decuwatch.repeats ADD COLUMN model text;
COMMENT ON COLUMN decuwatch.repeats.model IS 'Model of the event that it repeats; NULL in rows that are older than this column';

-- Events that nobody took are open: sent again when somebody scores their model, they get their verdict. Their messages stay
-- settled by their dead letters.
DELETE FROM decuwatch.events e WHERE outcome = 'dead_letter' AND reason IN ('unknown_model', 'orphaned')
    AND EXISTS (SELECT FROM decuwatch.dead_letters d WHERE d.stream = e.stream AND d.sequence = e.sequence AND d.digest = e.digest);

-- A dead letter that is no verdict on its event has no row in events; it is counted as the others are.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION decuwatch.redeliver(letter bigint, asked_by text) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    d      decuwatch.dead_letters%ROWTYPE;
    answer bigint;
BEGIN
    SELECT * INTO d FROM decuwatch.dead_letters WHERE id = letter;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no dead letter %', letter USING ERRCODE = 'no_data_found';
    END IF;
    IF d.kind NOT IN ('orphaned', 'unknown_model', 'given_up', 'failed') THEN
        RAISE EXCEPTION 'dead letter % is %, must be orphaned, unknown_model, given_up or failed: its message would fail again', letter, d.kind
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO decuwatch.redeliveries (dead_letter, stream, sequence, digest, source, event_id, kind, requested_by)
        VALUES (d.id, d.stream, d.sequence, d.digest, d.source, d.event_id, d.kind, asked_by)
        ON CONFLICT (dead_letter) DO NOTHING RETURNING id INTO answer;
    IF answer IS NULL THEN -- asked for before; its message may still have to be published
        SELECT id INTO answer FROM decuwatch.redeliveries WHERE dead_letter = letter;
        RETURN answer;
    END IF;
    DELETE FROM decuwatch.events e WHERE e.source = d.source AND e.event_id = d.event_id AND e.model = d.model AND e.digest = d.digest
        AND e.outcome = 'dead_letter' AND e.stream = d.stream AND e.sequence = d.sequence;
    -- The verdict is counted when it is made anew. An event on the subject of its model was counted by its own time.
    INSERT INTO decuwatch.outcome_hour_parts (hour, model, outcome, reason, n)
        VALUES (date_trunc('hour', CASE WHEN d.subject IN ('', 'generation.requested.' || d.model)
            THEN coalesce(d.event_time, d.recorded_at) ELSE d.recorded_at END, 'UTC'), coalesce(d.model, ''), 'dead_letter', d.kind, -1);
    RETURN answer;
END $$;
-- +goose StatementEnd

-- +goose Down
-- Only the first of several events that share source and id can stay.
DELETE FROM decuwatch.events e USING decuwatch.events f
    WHERE f.source = e.source AND f.event_id = e.event_id AND (f.recorded_at, f.model) < (e.recorded_at, e.model);
DELETE FROM decuwatch.skips e USING decuwatch.skips f
    WHERE f.source = e.source AND f.event_id = e.event_id AND (f.recorded_at, f.model) < (e.recorded_at, e.model);
ALTER TABLE decuwatch.events DROP CONSTRAINT events_pkey, ADD PRIMARY KEY (source, event_id);
ALTER TABLE decuwatch.skips DROP CONSTRAINT skips_pkey, ADD PRIMARY KEY (source, event_id);
ALTER TABLE decuwatch.repeats DROP COLUMN model;

-- +goose Up
CREATE TABLE decuwatch.stream_positions (
    stream   text NOT NULL,
    created  timestamptz NOT NULL,
    begun_at bigint NOT NULL CHECK (begun_at >= 0),
    position bigint NOT NULL CHECK (position >= 0),
    moved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (stream, created)
);
COMMENT ON TABLE decuwatch.stream_positions IS 'How far each stream of events has been swept: every message up to the position was seen to have its verdict, or was reported as lost';
COMMENT ON COLUMN decuwatch.stream_positions.stream IS 'JetStream stream';
COMMENT ON COLUMN decuwatch.stream_positions.created IS 'When the stream was made, by the NATS server: a stream that is made anew counts from 1 again';
COMMENT ON COLUMN decuwatch.stream_positions.begun_at IS 'Sequence of the last message before the first that is accounted for';
COMMENT ON COLUMN decuwatch.stream_positions.position IS 'Sequence of the last message that was swept';
COMMENT ON COLUMN decuwatch.stream_positions.moved_at IS 'When the position was last moved';

CREATE TABLE decuwatch.redeliveries (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    dead_letter   bigint NOT NULL UNIQUE,
    stream        text NOT NULL,
    sequence      bigint NOT NULL,
    digest        decuwatch.digest NOT NULL,
    source        text,
    event_id      text,
    kind          text NOT NULL,
    requested_by  text NOT NULL CHECK (length(requested_by) BETWEEN 1 AND 256),
    requested_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    published_as  bigint
);
CREATE INDEX redeliveries_by_request ON decuwatch.redeliveries (requested_at);
COMMENT ON TABLE decuwatch.redeliveries IS 'Dead letters that an operator brought back for scoring. The dead letter stays; its event gets a new verdict under a new message';
COMMENT ON COLUMN decuwatch.redeliveries.id IS 'Number of the row';
COMMENT ON COLUMN decuwatch.redeliveries.dead_letter IS 'Row of dead_letters';
COMMENT ON COLUMN decuwatch.redeliveries.stream IS 'JetStream stream of the dead letter''s message';
COMMENT ON COLUMN decuwatch.redeliveries.sequence IS 'Sequence of the dead letter''s message';
COMMENT ON COLUMN decuwatch.redeliveries.digest IS 'SHA-256 of the message';
COMMENT ON COLUMN decuwatch.redeliveries.source IS 'CloudEvents source of the event; NULL if the message is not an event';
COMMENT ON COLUMN decuwatch.redeliveries.event_id IS 'CloudEvents id of the event; NULL if the message is not an event';
COMMENT ON COLUMN decuwatch.redeliveries.kind IS 'Kind of the dead letter';
COMMENT ON COLUMN decuwatch.redeliveries.requested_by IS 'Who asked for it';
COMMENT ON COLUMN decuwatch.redeliveries.requested_at IS 'When it was asked for; from then on the event is open for a new verdict';
COMMENT ON COLUMN decuwatch.redeliveries.published_as IS 'Sequence under which the message was published again; NULL until then';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.redeliver(letter bigint, asked_by text) RETURNS bigint
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
    DELETE FROM decuwatch.events e WHERE e.source = d.source AND e.event_id = d.event_id AND e.digest = d.digest
        AND e.outcome = 'dead_letter' AND e.stream = d.stream AND e.sequence = d.sequence;
    IF FOUND THEN -- the verdict is counted when it is made anew
        INSERT INTO decuwatch.outcome_hour_parts (hour, model, outcome, reason, n)
            VALUES (date_trunc('hour', coalesce(d.event_time, d.recorded_at), 'UTC'), coalesce(d.model, ''), 'dead_letter', d.kind, -1);
    END IF;
    RETURN answer;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.redeliver IS 'Opens the event of a dead letter for a new verdict, records who asked for it, and returns the row of redeliveries';

GRANT SELECT ON decuwatch.stream_positions, decuwatch.redeliveries TO decuwatch_writer;
GRANT INSERT ON decuwatch.stream_positions TO decuwatch_writer;
GRANT UPDATE (position, moved_at) ON decuwatch.stream_positions TO decuwatch_writer;
GRANT UPDATE (published_as) ON decuwatch.redeliveries TO decuwatch_writer;
REVOKE EXECUTE ON FUNCTION decuwatch.redeliver FROM PUBLIC;
GRANT EXECUTE ON FUNCTION decuwatch.redeliver TO decuwatch_writer;

-- +goose Down
DROP FUNCTION decuwatch.redeliver;
DROP TABLE decuwatch.redeliveries;
DROP TABLE decuwatch.stream_positions;

-- +goose Up
ALTER TABLE decuwatch.dead_letters DROP CONSTRAINT dead_letters_check;
COMMENT ON COLUMN decuwatch.dead_letters.source IS 'CloudEvents source, if it could be read';
COMMENT ON COLUMN decuwatch.dead_letters.event_id IS 'CloudEvents id, if it could be read';

CREATE TABLE decuwatch.repeats (
    stream      text NOT NULL,
    sequence    bigint NOT NULL,
    digest      decuwatch.digest NOT NULL,
    source      text NOT NULL,
    event_id    text NOT NULL,
    delivered   integer NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (stream, sequence, digest)
);
CREATE INDEX repeats_by_recording ON decuwatch.repeats USING brin (recorded_at);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.repeats FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.repeats IS 'Messages that repeat an event which has its verdict: the verdict stands, and the message is settled. Together with events and dead_letters every settled sequence of the stream has a row';
COMMENT ON COLUMN decuwatch.repeats.stream IS 'JetStream stream of the message';
COMMENT ON COLUMN decuwatch.repeats.sequence IS 'Sequence of the message in the stream';
COMMENT ON COLUMN decuwatch.repeats.digest IS 'SHA-256 of the message; part of the key, since a stream that was made anew counts from 1 again';
COMMENT ON COLUMN decuwatch.repeats.source IS 'CloudEvents source of the event that it repeats';
COMMENT ON COLUMN decuwatch.repeats.event_id IS 'CloudEvents id of the event that it repeats';
COMMENT ON COLUMN decuwatch.repeats.delivered IS 'On which delivery the repeat was recognized, from 1';
COMMENT ON COLUMN decuwatch.repeats.recorded_at IS 'When the repeat was recognized';

CREATE TABLE decuwatch.tries (
    stream      text NOT NULL,
    sequence    bigint NOT NULL,
    digest      decuwatch.digest NOT NULL,
    failed      integer NOT NULL DEFAULT 0 CHECK (failed >= 0),
    handed_back integer NOT NULL DEFAULT 0 CHECK (handed_back >= 0),
    watched     integer NOT NULL DEFAULT 0 CHECK (watched >= 0),
    alone       integer NOT NULL DEFAULT 0 CHECK (alone >= 0),
    tried_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (stream, sequence, digest)
);
CREATE INDEX tries_by_time ON decuwatch.tries (tried_at);
COMMENT ON TABLE decuwatch.tries IS 'Attempts on messages that did not come to a verdict at once. Most messages have no row';
COMMENT ON COLUMN decuwatch.tries.stream IS 'JetStream stream of the message';
COMMENT ON COLUMN decuwatch.tries.sequence IS 'Sequence of the message in the stream';
COMMENT ON COLUMN decuwatch.tries.digest IS 'SHA-256 of the message; part of the key, since a stream that was made anew counts from 1 again';
COMMENT ON COLUMN decuwatch.tries.failed IS 'Attempts that ended with an error';
COMMENT ON COLUMN decuwatch.tries.handed_back IS 'Attempts that a worker gave up because it was stopped';
COMMENT ON COLUMN decuwatch.tries.watched IS 'Attempts among few others that began and did not end: their worker ended without a word';
COMMENT ON COLUMN decuwatch.tries.alone IS 'Attempts alone in the worker that began and did not end: their worker ended without a word';
COMMENT ON COLUMN decuwatch.tries.tried_at IS 'When the row was last written';

GRANT SELECT, INSERT ON decuwatch.repeats TO decuwatch_writer;
GRANT SELECT, INSERT ON decuwatch.tries TO decuwatch_writer;
GRANT UPDATE (failed, handed_back, watched, alone, tried_at) ON decuwatch.tries TO decuwatch_writer;

-- +goose Down
DROP TABLE decuwatch.tries;
DROP TABLE decuwatch.repeats;
ALTER TABLE decuwatch.dead_letters ADD CONSTRAINT dead_letters_check
    CHECK ((source IS NULL) = (event_id IS NULL) AND (source IS NULL) = (event_time IS NULL)) NOT VALID;

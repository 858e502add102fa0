-- +goose Up
-- Payloads of dead letters that are the producer's fault are bounded: kept for a time of their own, and cut if an hour brings
-- too many bytes of them. Everything else of the row stays as long as the ledger.
ALTER TABLE decuwatch.dead_letters
    ADD COLUMN payload_size integer,
    ADD COLUMN payload_state text NOT NULL DEFAULT 'whole' CHECK (payload_state IN ('whole', 'cut', 'expired'));
COMMENT ON COLUMN decuwatch.dead_letters.payload IS 'The message''s payload, or what is kept of it (payload_state)';
COMMENT ON COLUMN decuwatch.dead_letters.payload_size IS 'Bytes of the payload as it came; NULL in rows that are older than this column';
COMMENT ON COLUMN decuwatch.dead_letters.payload_state IS
    'whole; cut: only its beginning is kept, if it is too large or too many came in an hour; expired: past retention.payloads';
CREATE INDEX dead_letters_with_payload ON decuwatch.dead_letters (recorded_at)
    WHERE kind NOT IN ('failed', 'given_up', 'orphaned') AND payload_state <> 'expired';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.refuse_dead_letter_update() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.payload = '' AND NEW.payload_state = 'expired'
        AND to_jsonb(NEW) - '{payload,payload_state}'::text[] = to_jsonb(OLD) - '{payload,payload_state}'::text[] THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION '%.% is append-only', TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = 'integrity_constraint_violation';
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.refuse_dead_letter_update IS 'Trigger of dead_letters: append-only, but for a payload that expires';
DROP TRIGGER append_only ON decuwatch.dead_letters;
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.dead_letters
    FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_dead_letter_update();

-- +goose StatementBegin
CREATE FUNCTION decuwatch.expire_payloads(keep interval) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    before  timestamptz := now() - decuwatch.check_retention('payloads', keep);
    expired bigint;
BEGIN
    UPDATE decuwatch.dead_letters SET payload = '', payload_state = 'expired' WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM decuwatch.dead_letters
        WHERE recorded_at < before AND kind NOT IN ('failed', 'given_up', 'orphaned') AND payload_state <> 'expired' LIMIT 10000));
    GET DIAGNOSTICS expired = ROW_COUNT;
    RETURN expired;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.expire_payloads IS
    'Empties payloads of dead letters that are the producer''s fault and older than a retention, at most 10,000 of them, and returns how many; 0 when it is done';
REVOKE EXECUTE ON FUNCTION decuwatch.expire_payloads FROM PUBLIC;
GRANT EXECUTE ON FUNCTION decuwatch.expire_payloads TO decuwatch_writer;

CREATE OR REPLACE VIEW decuwatch_views.dead_letters AS
SELECT id, recorded_at, kind, field, reason, model, source, event_id, event_time, subject, stream, sequence, delivered,
       coalesce(payload_size, octet_length(payload)) AS payload_bytes, left(encode(payload, 'escape'), 4096) AS payload_text, payload_state
FROM decuwatch.dead_letters;
COMMENT ON COLUMN decuwatch_views.dead_letters.payload_bytes IS 'Size of the payload as it came';
COMMENT ON COLUMN decuwatch_views.dead_letters.payload_state IS
    'whole; cut: only its beginning is kept, if it is too large or too many came in an hour; expired: past retention.payloads';

-- +goose Down
DROP VIEW decuwatch_views.dead_letters;
CREATE VIEW decuwatch_views.dead_letters AS
SELECT id, recorded_at, kind, field, reason, model, source, event_id, event_time, subject, stream, sequence, delivered,
       octet_length(payload) AS payload_bytes, left(encode(payload, 'escape'), 4096) AS payload_text
FROM decuwatch.dead_letters;
GRANT SELECT ON decuwatch_views.dead_letters TO decuwatch_reader, decuwatch_writer;
DROP FUNCTION decuwatch.expire_payloads;
DROP TRIGGER append_only ON decuwatch.dead_letters;
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.dead_letters FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
DROP FUNCTION decuwatch.refuse_dead_letter_update;
DROP INDEX decuwatch.dead_letters_with_payload;
ALTER TABLE decuwatch.dead_letters DROP COLUMN payload_state, DROP COLUMN payload_size;

-- +goose Up
CREATE TABLE decuwatch.workers (
    id              text NOT NULL CHECK (length(id) BETWEEN 1 AND 64),
    model           text NOT NULL CHECK (length(model) BETWEEN 1 AND 64),
    ensemble_digest decuwatch.digest NOT NULL,
    settings        text NOT NULL CHECK (length(settings) <= 256),
    host            text NOT NULL CHECK (length(host) <= 256),
    started_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (id, model)
);
COMMENT ON TABLE decuwatch.workers IS 'Processes that score, and with what. Each writes its rows again every few seconds: a worker that cannot is not ready';
COMMENT ON COLUMN decuwatch.workers.id IS 'The process, by a name that it draws at its start';
COMMENT ON COLUMN decuwatch.workers.model IS 'Model that it scores';
COMMENT ON COLUMN decuwatch.workers.ensemble_digest IS 'SHA-256 of the manifest of the ensemble that it scores with';
COMMENT ON COLUMN decuwatch.workers.settings IS 'Settings key of its fixed profile';
COMMENT ON COLUMN decuwatch.workers.host IS 'Machine that it runs on';
COMMENT ON COLUMN decuwatch.workers.started_at IS 'When it wrote the row first, by the clock of the database';
COMMENT ON COLUMN decuwatch.workers.seen_at IS 'When it wrote the row last, by the clock of the database';
GRANT SELECT, INSERT, UPDATE (seen_at) ON decuwatch.workers TO decuwatch_writer;

-- +goose StatementBegin
CREATE FUNCTION decuwatch.forget_workers() RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM decuwatch.workers WHERE seen_at < clock_timestamp() - interval '1 day'
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.forget_workers IS 'Deletes the rows of workers that were not seen for a day';
REVOKE EXECUTE ON FUNCTION decuwatch.forget_workers FROM PUBLIC;
GRANT EXECUTE ON FUNCTION decuwatch.forget_workers TO decuwatch_writer;

-- +goose Down
DROP FUNCTION decuwatch.forget_workers;
DROP TABLE decuwatch.workers;

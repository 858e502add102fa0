-- +goose Up
CREATE TABLE decuwatch.migration_hashes (
    version_id bigint PRIMARY KEY,
    file       text NOT NULL,
    sha256     decuwatch.digest NOT NULL,
    stored_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE decuwatch.migration_hashes IS 'What each applied migration held, so that one that was edited later is noticed by name';
COMMENT ON COLUMN decuwatch.migration_hashes.version_id IS 'Number of the migration';
COMMENT ON COLUMN decuwatch.migration_hashes.file IS 'Name of its file';
COMMENT ON COLUMN decuwatch.migration_hashes.sha256 IS 'SHA-256 of its file';
COMMENT ON COLUMN decuwatch.migration_hashes.stored_at IS 'When the hash was stored; later than the migration itself if that is older than this table';
GRANT SELECT ON decuwatch.migration_hashes TO decuwatch_writer;

-- +goose Down
DROP TABLE decuwatch.migration_hashes;

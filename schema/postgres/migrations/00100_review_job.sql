-- +goose Up
ALTER TABLE decuwatch.evidence_jobs ADD COLUMN done_at timestamptz;
COMMENT ON COLUMN decuwatch.evidence_jobs.done_at IS 'When the evidence was stored; NULL until then';
CREATE INDEX evidence_jobs_failed ON decuwatch.evidence_jobs (review_id) WHERE state = 'failed';
CREATE INDEX reviews_by_event ON decuwatch.reviews (source, event_id);
CREATE INDEX reviews_by_event_time ON decuwatch.reviews (model, event_time);

-- +goose Down
DROP INDEX decuwatch.reviews_by_event_time;
DROP INDEX decuwatch.reviews_by_event;
DROP INDEX decuwatch.evidence_jobs_failed;
ALTER TABLE decuwatch.evidence_jobs DROP COLUMN done_at;

-- +goose Up
CREATE TABLE decuwatch.reviews (
    id              text PRIMARY KEY,
    kind            text NOT NULL CHECK (kind IN ('alert', 'sample')),
    alert_id        text REFERENCES decuwatch.alerts ON DELETE CASCADE CHECK ((kind = 'alert') = (alert_id IS NOT NULL)),
    source          text NOT NULL,
    event_id        text NOT NULL,
    event_time      timestamptz NOT NULL,
    model           text NOT NULL,
    ensemble_digest text NOT NULL,
    class_index     integer NOT NULL,
    class_label     text NOT NULL,
    state           text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'acknowledged', 'resolved')),
    verdict         text CHECK (verdict IN ('confirmed', 'false_alarm', 'expected')),
    assignee        text NOT NULL DEFAULT '',
    version         integer NOT NULL DEFAULT 1 CHECK (version >= 1),
    opened_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    resolved_at     timestamptz,
    CHECK ((state = 'resolved') = (verdict IS NOT NULL) AND (state = 'resolved') = (resolved_at IS NOT NULL))
);
CREATE UNIQUE INDEX reviews_by_alert ON decuwatch.reviews (alert_id);
CREATE INDEX reviews_by_state ON decuwatch.reviews (state, opened_at DESC);
CREATE INDEX reviews_by_class ON decuwatch.reviews (model, class_index, opened_at DESC);
COMMENT ON TABLE decuwatch.reviews IS 'What people look at: every alert on a score, and a random share of unalerted requests so that recall can be estimated';
COMMENT ON COLUMN decuwatch.reviews.id IS 'The alert''s id, or one derived from the event for a sample';
COMMENT ON COLUMN decuwatch.reviews.kind IS 'alert or sample; not shown to the reviewer before the verdict';
COMMENT ON COLUMN decuwatch.reviews.alert_id IS 'The alert; NULL for a sample';
COMMENT ON COLUMN decuwatch.reviews.source IS 'CloudEvents source of the event';
COMMENT ON COLUMN decuwatch.reviews.event_id IS 'CloudEvents id of the event';
COMMENT ON COLUMN decuwatch.reviews.event_time IS 'Time of the event';
COMMENT ON COLUMN decuwatch.reviews.model IS 'Model';
COMMENT ON COLUMN decuwatch.reviews.ensemble_digest IS 'Ensemble that scored';
COMMENT ON COLUMN decuwatch.reviews.class_index IS 'Index of the class';
COMMENT ON COLUMN decuwatch.reviews.class_label IS 'Label of the class';
COMMENT ON COLUMN decuwatch.reviews.state IS 'open, acknowledged or resolved';
COMMENT ON COLUMN decuwatch.reviews.verdict IS 'confirmed, false_alarm or expected; NULL until resolved';
COMMENT ON COLUMN decuwatch.reviews.assignee IS 'Who looks at it; empty where nobody does';
COMMENT ON COLUMN decuwatch.reviews.version IS 'Counts changes, for optimistic locking: a change names the version that it saw';
COMMENT ON COLUMN decuwatch.reviews.opened_at IS 'When it entered review';
COMMENT ON COLUMN decuwatch.reviews.updated_at IS 'When it last changed';
COMMENT ON COLUMN decuwatch.reviews.resolved_at IS 'When it was resolved';

CREATE TABLE decuwatch.review_history (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    review_id text NOT NULL REFERENCES decuwatch.reviews ON DELETE CASCADE,
    version   integer NOT NULL,
    action    text NOT NULL CHECK (action IN ('acknowledge', 'resolve', 'reopen', 'assign', 'comment')),
    actor     text NOT NULL CHECK (actor <> ''),
    state     text NOT NULL,
    verdict   text,
    assignee  text NOT NULL,
    comment   text NOT NULL CHECK (length(comment) <= 4000),
    at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (review_id, version)
);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.review_history FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.review_history IS 'Every change of a review, append-only';
COMMENT ON COLUMN decuwatch.review_history.id IS 'Number of the row';
COMMENT ON COLUMN decuwatch.review_history.review_id IS 'The review';
COMMENT ON COLUMN decuwatch.review_history.version IS 'Version of the review after the change';
COMMENT ON COLUMN decuwatch.review_history.action IS 'acknowledge, resolve, reopen, assign or comment';
COMMENT ON COLUMN decuwatch.review_history.actor IS 'Who';
COMMENT ON COLUMN decuwatch.review_history.state IS 'State after the change';
COMMENT ON COLUMN decuwatch.review_history.verdict IS 'Verdict after the change';
COMMENT ON COLUMN decuwatch.review_history.assignee IS 'Assignee after the change';
COMMENT ON COLUMN decuwatch.review_history.comment IS 'What was said, at most 4000 characters';
COMMENT ON COLUMN decuwatch.review_history.at IS 'When';

CREATE TABLE decuwatch.evidence (
    review_id    text NOT NULL REFERENCES decuwatch.reviews ON DELETE CASCADE,
    name         text NOT NULL CHECK (name ~ '^[a-z0-9-]{1,64}$'),
    content_type text NOT NULL CHECK (content_type IN ('image/png', 'application/json')),
    body         bytea NOT NULL CHECK (octet_length(body) <= 1048576),
    made_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (review_id, name)
);
CREATE INDEX evidence_by_time ON decuwatch.evidence (made_at);
COMMENT ON TABLE decuwatch.evidence IS 'What a reviewer sees: the images of the components, the map of uncertainty, the numbers behind them. Kept for a time of its own';
COMMENT ON COLUMN decuwatch.evidence.review_id IS 'The review';
COMMENT ON COLUMN decuwatch.evidence.name IS 'image-0, image-1, ...; map; numbers';
COMMENT ON COLUMN decuwatch.evidence.content_type IS 'image/png or application/json';
COMMENT ON COLUMN decuwatch.evidence.body IS 'The file, at most 1 MiB';
COMMENT ON COLUMN decuwatch.evidence.made_at IS 'When it was made';

CREATE TABLE decuwatch.evidence_jobs (
    review_id       text PRIMARY KEY REFERENCES decuwatch.reviews ON DELETE CASCADE,
    state           text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'done', 'failed')),
    attempts        integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_error      text NOT NULL DEFAULT ''
);
CREATE INDEX evidence_jobs_pending ON decuwatch.evidence_jobs (next_attempt_at) WHERE state = 'pending';
COMMENT ON TABLE decuwatch.evidence_jobs IS 'Evidence that is owed to a review; made behind live work';
COMMENT ON COLUMN decuwatch.evidence_jobs.review_id IS 'The review';
COMMENT ON COLUMN decuwatch.evidence_jobs.state IS 'pending, done or failed';
COMMENT ON COLUMN decuwatch.evidence_jobs.attempts IS 'How often it was begun';
COMMENT ON COLUMN decuwatch.evidence_jobs.next_attempt_at IS 'Not before; in the future while a worker holds the job';
COMMENT ON COLUMN decuwatch.evidence_jobs.last_error IS 'Why the last attempt failed';

CREATE TABLE decuwatch.canaries (
    source       text NOT NULL,
    event_id     text NOT NULL,
    model        text NOT NULL,
    class_index  integer NOT NULL,
    class_label  text NOT NULL,
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    due_at       timestamptz NOT NULL,
    outcome      text CHECK (outcome IN ('caught', 'missed')),
    decided_at   timestamptz CHECK ((outcome IS NULL) = (decided_at IS NULL)),
    PRIMARY KEY (source, event_id)
);
CREATE INDEX canaries_open ON decuwatch.canaries (due_at) WHERE outcome IS NULL;
COMMENT ON TABLE decuwatch.canaries IS 'Events of known under-trained classes that were published to see whether the monitor alerts';
COMMENT ON COLUMN decuwatch.canaries.source IS 'CloudEvents source of the canary';
COMMENT ON COLUMN decuwatch.canaries.event_id IS 'CloudEvents id of the canary';
COMMENT ON COLUMN decuwatch.canaries.model IS 'Model';
COMMENT ON COLUMN decuwatch.canaries.class_index IS 'Index of the class';
COMMENT ON COLUMN decuwatch.canaries.class_label IS 'Label of the class';
COMMENT ON COLUMN decuwatch.canaries.published_at IS 'When it was published';
COMMENT ON COLUMN decuwatch.canaries.due_at IS 'By when an alert is expected';
COMMENT ON COLUMN decuwatch.canaries.outcome IS 'caught or missed; NULL while it is open';
COMMENT ON COLUMN decuwatch.canaries.decided_at IS 'When the outcome was known';

-- +goose Down
DROP TABLE decuwatch.canaries;
DROP TABLE decuwatch.evidence_jobs;
DROP TABLE decuwatch.evidence;
DROP TABLE decuwatch.review_history;
DROP TABLE decuwatch.reviews;

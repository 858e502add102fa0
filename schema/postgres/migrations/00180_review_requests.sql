-- +goose Up
-- A request enters review once, however many alerts it raised.
ALTER TABLE decuwatch.reviews
    ADD COLUMN labels jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN measured jsonb NOT NULL DEFAULT '{}';
COMMENT ON COLUMN decuwatch.reviews.labels IS 'Labels of the event, to search for';
COMMENT ON COLUMN decuwatch.reviews.measured IS 'Value of each measurement by its name, to sort by';

UPDATE decuwatch.reviews r
SET labels = a.labels, measured = jsonb_build_object('class_gap', a.class_gap, 'request_risk', a.request_risk)
FROM decuwatch.alerts a WHERE a.id = r.alert_id;
UPDATE decuwatch.reviews r
SET labels = s.labels, measured = jsonb_build_object('class_gap', s.class_gap, 'request_risk', s.request_risk)
FROM decuwatch.scores s
WHERE r.kind = 'sample' AND s.event_time = r.event_time AND s.source = r.source AND s.event_id = r.event_id
    AND s.model = r.model AND s.ensemble_digest = r.ensemble_digest;

-- Of the reviews of one request, the one with the newest verdict stays, else the one that somebody looks at, else the
-- one of the most severe alert. It takes over the histories of the others.
CREATE TEMPORARY TABLE merged ON COMMIT DROP AS
SELECT r.id, first_value(r.id) OVER (
        PARTITION BY r.source, r.event_id, r.model
        ORDER BY r.resolved_at DESC NULLS LAST, r.state = 'acknowledged' DESC, a.severity = 'critical' DESC NULLS LAST,
            r.id
    ) AS kept
FROM decuwatch.reviews r LEFT JOIN decuwatch.alerts a ON a.id = r.alert_id;
DELETE FROM merged WHERE kept NOT IN (SELECT kept FROM merged GROUP BY kept HAVING count(*) > 1);
CREATE TEMPORARY TABLE merged_history ON COMMIT DROP AS
SELECT m.kept AS review_id, row_number() OVER (PARTITION BY m.kept ORDER BY h.at, h.id) + 1 AS version,
    h.action, h.actor, h.state, h.verdict, h.assignee, h.comment, h.at
FROM decuwatch.review_history h JOIN merged m ON m.id = h.review_id;
DELETE FROM decuwatch.review_history WHERE review_id IN (SELECT id FROM merged);
DELETE FROM decuwatch.reviews WHERE id IN (SELECT id FROM merged WHERE id <> kept);
INSERT INTO decuwatch.review_history (review_id, version, action, actor, state, verdict, assignee, comment, at)
SELECT review_id, version, action, actor, state, verdict, assignee, comment, at FROM merged_history
ORDER BY review_id, version;
UPDATE decuwatch.reviews r
SET version = (SELECT count(*) + 1 FROM decuwatch.review_history h WHERE h.review_id = r.id)
WHERE id IN (SELECT kept FROM merged);
DROP TABLE merged, merged_history;

CREATE UNIQUE INDEX reviews_by_request ON decuwatch.reviews (source, event_id, model);
DROP INDEX decuwatch.reviews_by_event;
COMMENT ON TABLE decuwatch.reviews IS
    'What people look at: every request with an alert, and a random share of the others so that recall can be estimated';
COMMENT ON COLUMN decuwatch.reviews.id IS 'The id of the most severe alert, or one derived from the event for a sample';
COMMENT ON COLUMN decuwatch.reviews.alert_id IS 'The most severe alert; NULL for a sample';

CREATE OR REPLACE VIEW decuwatch.review_list AS
SELECT r.id, r.kind, coalesce(r.alert_id, '') AS alert_id, r.source, r.event_id, r.event_time, r.model,
    r.ensemble_digest, r.class_index, r.class_label, r.state, coalesce(r.verdict, '') AS verdict, r.assignee, r.version,
    r.opened_at, r.updated_at, r.resolved_at,
    coalesce(a.severity, '') AS severity, coalesce(a.reason, '') AS reason, coalesce(a.measurement, '') AS measurement,
    coalesce(j.state, '') AS evidence, coalesce(j.attempts, 0) AS evidence_attempts,
    coalesce(j.last_error, '') AS evidence_error, r.labels, r.measured
FROM decuwatch.reviews r
LEFT JOIN decuwatch.alerts a ON a.id = r.alert_id
LEFT JOIN decuwatch.evidence_jobs j ON j.review_id = r.id;
COMMENT ON COLUMN decuwatch.review_list.labels IS 'Labels of the event, to search for';
COMMENT ON COLUMN decuwatch.review_list.measured IS 'Value of each measurement by its name, to sort by';

-- Each alert of a request shows the request's review. The view may have got columns since it was first made.
-- +goose StatementBegin
DO $$
DECLARE
    before text := pg_get_viewdef('decuwatch_views.alerts');
    after  text := replace(before, 'ON ((r.alert_id = a.id))', 'ON (((r.source = a.source) AND (r.event_id = a.event_id) '
        'AND (r.model = a.model) AND (a.kind = ''score''::text)))');
BEGIN
    ASSERT before <> after, 'the view of alerts joins reviews in another way';
    EXECUTE 'CREATE OR REPLACE VIEW decuwatch_views.alerts AS ' || after;
END $$;
-- +goose StatementEnd
COMMENT ON VIEW decuwatch_views.alerts IS 'Alerts with the state of their request''s review';

-- +goose Down
-- +goose StatementBegin
DO $$
BEGIN
    EXECUTE 'CREATE OR REPLACE VIEW decuwatch_views.alerts AS ' || replace(pg_get_viewdef('decuwatch_views.alerts'),
        'ON (((r.source = a.source) AND (r.event_id = a.event_id) AND (r.model = a.model) AND (a.kind = ''score''::text)))',
        'ON ((r.alert_id = a.id))');
END $$;
-- +goose StatementEnd
DROP VIEW decuwatch.review_list;
CREATE VIEW decuwatch.review_list AS
SELECT r.id, r.kind, coalesce(r.alert_id, '') AS alert_id, r.source, r.event_id, r.event_time, r.model,
    r.ensemble_digest, r.class_index, r.class_label, r.state, coalesce(r.verdict, '') AS verdict, r.assignee, r.version,
    r.opened_at, r.updated_at, r.resolved_at,
    coalesce(a.severity, '') AS severity, coalesce(a.reason, '') AS reason, coalesce(a.measurement, '') AS measurement,
    coalesce(j.state, '') AS evidence, coalesce(j.attempts, 0) AS evidence_attempts,
    coalesce(j.last_error, '') AS evidence_error
FROM decuwatch.reviews r
LEFT JOIN decuwatch.alerts a ON a.id = r.alert_id
LEFT JOIN decuwatch.evidence_jobs j ON j.review_id = r.id;
GRANT SELECT ON decuwatch.review_list TO decuwatch_writer;
CREATE INDEX reviews_by_event ON decuwatch.reviews (source, event_id);
DROP INDEX decuwatch.reviews_by_request;
ALTER TABLE decuwatch.reviews DROP COLUMN labels, DROP COLUMN measured;

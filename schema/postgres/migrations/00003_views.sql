-- +goose Up
CREATE SCHEMA decuwatch_views;
COMMENT ON SCHEMA decuwatch_views IS 'Views for analysts and dashboards; their names and columns are stable. The role decuwatch_reader sees nothing else';

CREATE VIEW decuwatch_views.scores AS
SELECT event_time, source, event_id, model, ensemble_digest, settings, class_index, class_label, labels,
       class_gap::double precision AS class_gap, class_gap_estimator, class_gap_upper_bound::double precision AS class_gap_upper_bound,
       class_gap_saturated, class_gap_mean_distance::double precision AS class_gap_mean_distance, class_gap_distances, class_gap_shares,
       request_risk::double precision AS request_risk, request_risk_estimator, request_risk_upper_bound::double precision AS request_risk_upper_bound,
       request_risk_saturated, request_risk_mean_distance::double precision AS request_risk_mean_distance, request_risk_distances, request_risk_shares,
       profile, steps, guidance_scale::double precision AS guidance_scale, eta::double precision AS eta, seed, noise, carrier, unet_rows,
       runtime, device, deviations, requested, scored_at, recorded_at
FROM decuwatch.scores;
COMMENT ON VIEW decuwatch_views.scores IS 'One row for each event that was scored: class, labels, both measurements, receipt';

CREATE VIEW decuwatch_views.class_risk_hourly AS
SELECT hour, model, ensemble_digest, settings, class_index, class_label,
       sum(n)::bigint AS n,
       sum(class_gap_sum) / sum(n) AS class_gap_mean,
       CASE WHEN sum(n) > 1 THEN sqrt(greatest(0, (sum(class_gap_squares) - sum(class_gap_sum) ^ 2 / sum(n)::double precision) / (sum(n)::double precision - 1))) END AS class_gap_sd,
       min(class_gap_min)::double precision AS class_gap_min,
       max(class_gap_max)::double precision AS class_gap_max,
       sum(class_gap_saturated)::bigint AS class_gap_saturated,
       sum(request_risk_sum) / sum(n) AS request_risk_mean,
       CASE WHEN sum(n) > 1 THEN sqrt(greatest(0, (sum(request_risk_squares) - sum(request_risk_sum) ^ 2 / sum(n)::double precision) / (sum(n)::double precision - 1))) END AS request_risk_sd,
       min(request_risk_min)::double precision AS request_risk_min,
       max(request_risk_max)::double precision AS request_risk_max,
       sum(request_risk_saturated)::bigint AS request_risk_saturated,
       sum(warnings)::bigint AS warnings,
       sum(criticals)::bigint AS criticals
FROM decuwatch.class_hour_parts
GROUP BY hour, model, ensemble_digest, settings, class_index, class_label;
COMMENT ON VIEW decuwatch_views.class_risk_hourly IS 'Scores by class and hour of event time, kept up at every commit: reads sums, never the scores themselves';

CREATE VIEW decuwatch_views.class_risk_daily AS
SELECT day, model, ensemble_digest, settings, class_index, class_label,
       sum(n)::bigint AS n,
       sum(class_gap_sum) / sum(n) AS class_gap_mean,
       CASE WHEN sum(n) > 1 THEN sqrt(greatest(0, (sum(class_gap_squares) - sum(class_gap_sum) ^ 2 / sum(n)::double precision) / (sum(n)::double precision - 1))) END AS class_gap_sd,
       min(class_gap_min)::double precision AS class_gap_min,
       max(class_gap_max)::double precision AS class_gap_max,
       sum(class_gap_saturated)::bigint AS class_gap_saturated,
       sum(request_risk_sum) / sum(n) AS request_risk_mean,
       CASE WHEN sum(n) > 1 THEN sqrt(greatest(0, (sum(request_risk_squares) - sum(request_risk_sum) ^ 2 / sum(n)::double precision) / (sum(n)::double precision - 1))) END AS request_risk_sd,
       min(request_risk_min)::double precision AS request_risk_min,
       max(request_risk_max)::double precision AS request_risk_max,
       sum(request_risk_saturated)::bigint AS request_risk_saturated,
       sum(warnings)::bigint AS warnings,
       sum(criticals)::bigint AS criticals
FROM decuwatch.class_day_parts
GROUP BY day, model, ensemble_digest, settings, class_index, class_label;
COMMENT ON VIEW decuwatch_views.class_risk_daily IS 'Scores by class and day of event time, kept up at every commit: reads sums, never the scores themselves';

CREATE VIEW decuwatch_views.coverage AS
SELECT hour, model, outcome, reason, sum(n)::bigint AS n
FROM decuwatch.outcome_hour_parts
GROUP BY hour, model, outcome, reason;
COMMENT ON VIEW decuwatch_views.coverage IS 'Verdicts by hour: how many messages were scored, skipped or put aside as dead letters, and why';

CREATE VIEW decuwatch_views.alerts AS
SELECT a.id, a.kind, a.source, a.event_id, a.event_time, a.model, a.ensemble_digest, a.settings, a.class_index, a.class_label, a.labels,
       a.severity, a.reason, a.measurement, a.value::double precision AS value, a.decided::double precision AS decided,
       a.threshold::double precision AS threshold, a.threshold_id, a.saturated, a.class_gap::double precision AS class_gap,
       a.request_risk::double precision AS request_risk, a.receipt, a.count, a.detail, a.fired_at, a.recorded_at, a.delivery,
       r.state AS review_state, r.verdict AS review_verdict, r.assignee AS review_assignee, r.resolved_at AS review_resolved_at
FROM decuwatch.alerts a LEFT JOIN decuwatch.reviews r ON r.alert_id = a.id;
COMMENT ON VIEW decuwatch_views.alerts IS 'Alerts with the state of their review';

CREATE VIEW decuwatch_views.thresholds_now AS
SELECT id, change_id, model, ensemble_digest, settings, measurement, scope, class_index, severity, value::double precision AS value,
       distance::double precision AS distance, origin, n, alpha::double precision AS alpha, achieved::double precision AS achieved,
       window_from, window_to, set_by, reason, set_at
FROM (
    SELECT DISTINCT ON (model, ensemble_digest, settings, measurement, scope, class_index, severity) *
    FROM decuwatch.thresholds
    ORDER BY model, ensemble_digest, settings, measurement, scope, class_index, severity, id DESC
) newest
WHERE NOT withdrawn;
COMMENT ON VIEW decuwatch_views.thresholds_now IS 'Thresholds in force: the newest of each key';

CREATE VIEW decuwatch_views.threshold_history AS
SELECT t.id, t.change_id, c.kind AS change_kind, t.model, t.ensemble_digest, t.settings, t.measurement, t.scope, t.class_index, t.severity,
       t.value::double precision AS value, t.distance::double precision AS distance, t.withdrawn, t.origin, t.n,
       t.alpha::double precision AS alpha, t.achieved::double precision AS achieved, t.window_from, t.window_to, t.set_by, t.reason, t.set_at
FROM decuwatch.thresholds t JOIN decuwatch.threshold_changes c ON c.id = t.change_id;
COMMENT ON VIEW decuwatch_views.threshold_history IS 'Every threshold that ever was, with who set it, when and why';

CREATE VIEW decuwatch_views.dead_letters AS
SELECT id, recorded_at, kind, field, reason, model, source, event_id, event_time, subject, stream, sequence, delivered,
       octet_length(payload) AS payload_bytes, left(encode(payload, 'escape'), 4096) AS payload_text
FROM decuwatch.dead_letters;
COMMENT ON VIEW decuwatch_views.dead_letters IS 'Messages that could not be scored, with the reason; payload_text shows the beginning of the payload, bytes that are no ASCII escaped';

CREATE VIEW decuwatch_views.skips AS
SELECT source, event_id, event_time, model, class, reason, detail, labels, recorded_at FROM decuwatch.skips;
COMMENT ON VIEW decuwatch_views.skips IS 'Events that were deliberately not scored';

CREATE VIEW decuwatch_views.events AS
SELECT source, event_id, event_time, model, outcome, reason, ensemble_digest, stream, sequence, delivered, recorded_at FROM decuwatch.events;
COMMENT ON VIEW decuwatch_views.events IS 'The ledger: which verdict each event got';

CREATE VIEW decuwatch_views.reviews AS
SELECT r.id, r.alert_id, r.kind, r.source, r.event_id, r.event_time, r.model, r.ensemble_digest, r.class_index, r.class_label,
       r.state, r.verdict, r.assignee, r.opened_at, r.updated_at, r.resolved_at, a.severity, a.reason AS alert_reason
FROM decuwatch.reviews r LEFT JOIN decuwatch.alerts a ON a.id = r.alert_id;
COMMENT ON VIEW decuwatch_views.reviews IS 'Reviews of alerts and of the random share of unalerted requests';

CREATE VIEW decuwatch_views.review_history AS
SELECT id, review_id, version, action, actor, state, verdict, assignee, comment, at FROM decuwatch.review_history;
COMMENT ON VIEW decuwatch_views.review_history IS 'Every change of a review';

CREATE VIEW decuwatch_views.evidence AS
SELECT review_id, name, content_type, body, made_at FROM decuwatch.evidence;
COMMENT ON VIEW decuwatch_views.evidence IS 'Images and numbers of a review, as long as they are kept';

CREATE VIEW decuwatch_views.canaries AS
SELECT source, event_id, model, class_index, class_label, published_at, due_at, outcome, decided_at FROM decuwatch.canaries;
COMMENT ON VIEW decuwatch_views.canaries IS 'Canary events and whether they were caught';

-- A view's column means what the column of the table means that it comes from.
-- +goose StatementBegin
DO $$
DECLARE c record;
BEGIN
    FOR c IN
        SELECT v.relname AS view, va.attname AS column, col_description(t.oid, ta.attnum) AS comment
        FROM pg_class v JOIN pg_namespace n ON n.oid = v.relnamespace AND n.nspname = 'decuwatch_views'
        JOIN pg_attribute va ON va.attrelid = v.oid AND va.attnum > 0 AND NOT va.attisdropped
        JOIN pg_class t ON t.relname = CASE v.relname
                WHEN 'thresholds_now' THEN 'thresholds' WHEN 'threshold_history' THEN 'thresholds'
                WHEN 'class_risk_hourly' THEN 'class_hour_parts' WHEN 'class_risk_daily' THEN 'class_day_parts' WHEN 'coverage' THEN 'outcome_hour_parts' ELSE v.relname END
            AND t.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'decuwatch')
        JOIN pg_attribute ta ON ta.attrelid = t.oid AND ta.attname = va.attname
        WHERE v.relkind = 'v'
    LOOP
        EXECUTE format('COMMENT ON COLUMN decuwatch_views.%I.%I IS %L', c.view, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd
COMMENT ON COLUMN decuwatch_views.class_risk_hourly.class_gap_mean IS 'Mean of class_gap';
COMMENT ON COLUMN decuwatch_views.class_risk_hourly.class_gap_sd IS 'Standard deviation of class_gap; NULL for one score';
COMMENT ON COLUMN decuwatch_views.class_risk_hourly.request_risk_mean IS 'Mean of request_risk';
COMMENT ON COLUMN decuwatch_views.class_risk_hourly.request_risk_sd IS 'Standard deviation of request_risk; NULL for one score';
COMMENT ON COLUMN decuwatch_views.class_risk_daily.class_gap_mean IS 'Mean of class_gap';
COMMENT ON COLUMN decuwatch_views.class_risk_daily.class_gap_sd IS 'Standard deviation of class_gap; NULL for one score';
COMMENT ON COLUMN decuwatch_views.class_risk_daily.request_risk_mean IS 'Mean of request_risk';
COMMENT ON COLUMN decuwatch_views.class_risk_daily.request_risk_sd IS 'Standard deviation of request_risk; NULL for one score';
COMMENT ON COLUMN decuwatch_views.alerts.review_state IS 'open, acknowledged or resolved; NULL where the alert has no review';
COMMENT ON COLUMN decuwatch_views.alerts.review_verdict IS 'confirmed, false_alarm or expected; NULL until resolved';
COMMENT ON COLUMN decuwatch_views.alerts.review_assignee IS 'Who looks at it';
COMMENT ON COLUMN decuwatch_views.alerts.review_resolved_at IS 'When the review was resolved';
COMMENT ON COLUMN decuwatch_views.threshold_history.change_kind IS 'manual, calibration, reference or rollback';
COMMENT ON COLUMN decuwatch_views.dead_letters.payload_bytes IS 'Size of the payload';
COMMENT ON COLUMN decuwatch_views.dead_letters.payload_text IS 'The payload''s beginning as text, bytes that are no ASCII escaped';
COMMENT ON COLUMN decuwatch_views.reviews.severity IS 'Severity of the alert; NULL for a sample';
COMMENT ON COLUMN decuwatch_views.reviews.alert_reason IS 'Why the alert fired; NULL for a sample';

-- Roles belong to the whole server: another database of it may have made them, at this very moment even.
-- +goose StatementBegin
DO $$
DECLARE role text;
BEGIN
    FOREACH role IN ARRAY ARRAY['decuwatch_writer', 'decuwatch_reader'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', role);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL;
            END;
        END IF;
    END LOOP;
END $$;
-- +goose StatementEnd

GRANT USAGE ON SCHEMA decuwatch_views TO decuwatch_reader, decuwatch_writer;
GRANT SELECT ON ALL TABLES IN SCHEMA decuwatch_views TO decuwatch_reader, decuwatch_writer;
GRANT USAGE ON SCHEMA decuwatch TO decuwatch_writer;
GRANT SELECT ON ALL TABLES IN SCHEMA decuwatch TO decuwatch_writer;
GRANT INSERT ON decuwatch.events, decuwatch.scores, decuwatch.skips, decuwatch.dead_letters, decuwatch.alerts, decuwatch.outbox,
    decuwatch.threshold_changes, decuwatch.thresholds, decuwatch.class_hour_parts, decuwatch.class_day_parts, decuwatch.outcome_hour_parts,
    decuwatch.reviews, decuwatch.review_history, decuwatch.evidence, decuwatch.evidence_jobs, decuwatch.canaries TO decuwatch_writer;
GRANT UPDATE ON decuwatch.outbox, decuwatch.reviews, decuwatch.evidence_jobs, decuwatch.canaries TO decuwatch_writer;
GRANT DELETE ON decuwatch.events, decuwatch.skips, decuwatch.dead_letters, decuwatch.alerts, decuwatch.outbox, decuwatch.class_hour_parts, decuwatch.class_day_parts,
    decuwatch.outcome_hour_parts, decuwatch.reviews, decuwatch.review_history, decuwatch.evidence, decuwatch.evidence_jobs, decuwatch.canaries TO decuwatch_writer;
REVOKE EXECUTE ON FUNCTION decuwatch.ensure_partition, decuwatch.drop_partitions FROM PUBLIC;
GRANT EXECUTE ON FUNCTION decuwatch.ensure_partition, decuwatch.drop_partitions TO decuwatch_writer;

-- +goose Down
-- The roles stay: other databases of the server may use them.
DROP SCHEMA decuwatch_views CASCADE;
REVOKE ALL ON ALL TABLES IN SCHEMA decuwatch FROM decuwatch_writer;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA decuwatch FROM decuwatch_writer;
REVOKE ALL ON SCHEMA decuwatch FROM decuwatch_writer;

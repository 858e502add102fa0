-- +goose Up
COMMENT ON SCHEMA decuwatch IS 'decuwatch: verdicts on generation events, thresholds, alerts and their deliveries. Analysts read the schema decuwatch_views instead';

CREATE DOMAIN decuwatch.finite AS double precision CHECK (VALUE > '-Infinity' AND VALUE < 'Infinity');
COMMENT ON DOMAIN decuwatch.finite IS 'A number that is neither NaN (which PostgreSQL orders above infinity) nor infinite';

CREATE DOMAIN decuwatch.digest AS text CHECK (VALUE ~ '^[0-9a-f]{64}$');
COMMENT ON DOMAIN decuwatch.digest IS 'SHA-256 in lower-case hex';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.all_finite(numbers double precision[]) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 'NaN' <> ALL (numbers) AND 'Infinity' <> ALL (numbers) AND '-Infinity' <> ALL (numbers);
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.all_finite IS 'Whether an array holds finite numbers only';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.refuse_update() RETURNS trigger LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    RAISE EXCEPTION '%.% is append-only', TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = 'integrity_constraint_violation';
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.refuse_update IS 'Trigger of the append-only tables';

CREATE TABLE decuwatch.events (
    source          text NOT NULL CHECK (octet_length(source) BETWEEN 1 AND 512),
    event_id        text NOT NULL CHECK (octet_length(event_id) BETWEEN 1 AND 256),
    digest          decuwatch.digest NOT NULL,
    outcome         text NOT NULL CHECK (outcome IN ('score', 'skip', 'dead_letter')),
    reason          text NOT NULL,
    event_time      timestamptz NOT NULL,
    model           text NOT NULL,
    ensemble_digest decuwatch.digest CHECK ((outcome = 'score') = (ensemble_digest IS NOT NULL)),
    stream          text NOT NULL,
    sequence        bigint NOT NULL,
    delivered       integer NOT NULL,
    recorded_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (source, event_id)
);
CREATE INDEX events_by_sequence ON decuwatch.events (stream, sequence);
CREATE INDEX events_by_recording ON decuwatch.events USING brin (recorded_at);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.events FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.events IS 'The ledger: one row for each event that has its verdict. Its key makes the first verdict the only one, across scores, skips and dead letters';
COMMENT ON COLUMN decuwatch.events.source IS 'CloudEvents source of the event';
COMMENT ON COLUMN decuwatch.events.event_id IS 'CloudEvents id, unique within the source';
COMMENT ON COLUMN decuwatch.events.digest IS 'SHA-256 of the message: tells a redelivery from an identifier used twice';
COMMENT ON COLUMN decuwatch.events.outcome IS 'Which table holds the verdict: score, skip or dead_letter';
COMMENT ON COLUMN decuwatch.events.reason IS 'Reason of a skip, kind of a dead letter; empty for a score';
COMMENT ON COLUMN decuwatch.events.event_time IS 'When the producer generated, from the event';
COMMENT ON COLUMN decuwatch.events.model IS 'Model that the event names';
COMMENT ON COLUMN decuwatch.events.ensemble_digest IS 'Ensemble that scored the event; NULL without a score';
COMMENT ON COLUMN decuwatch.events.stream IS 'JetStream stream of the message that got the verdict';
COMMENT ON COLUMN decuwatch.events.sequence IS 'Sequence of that message in the stream';
COMMENT ON COLUMN decuwatch.events.delivered IS 'On which delivery of the message the verdict was made, from 1';
COMMENT ON COLUMN decuwatch.events.recorded_at IS 'When the verdict was written';

CREATE TABLE decuwatch.scores (
    event_time                timestamptz NOT NULL,
    source                    text NOT NULL,
    event_id                  text NOT NULL,
    ensemble_digest           decuwatch.digest NOT NULL,
    model                     text NOT NULL CHECK (length(model) BETWEEN 1 AND 64),
    settings                  text NOT NULL CHECK (length(settings) BETWEEN 1 AND 1024),
    class_index               integer NOT NULL CHECK (class_index >= 0),
    class_label               text NOT NULL CHECK (length(class_label) <= 128),
    class_gap                 decuwatch.finite NOT NULL,
    class_gap_estimator       text NOT NULL,
    class_gap_upper_bound     decuwatch.finite NOT NULL CHECK (class_gap_upper_bound >= 0),
    class_gap_saturated       boolean NOT NULL,
    class_gap_mean_distance   decuwatch.finite NOT NULL CHECK (class_gap_mean_distance >= 0),
    class_gap_distances       double precision[] NOT NULL CHECK (decuwatch.all_finite(class_gap_distances)),
    class_gap_shares          double precision[] NOT NULL CHECK (decuwatch.all_finite(class_gap_shares)),
    class_gap_branch_step     integer NOT NULL CHECK (class_gap_branch_step >= 0),
    class_gap_rollout_steps   integer NOT NULL CHECK (class_gap_rollout_steps >= 0),
    request_risk               decuwatch.finite NOT NULL,
    request_risk_estimator     text NOT NULL,
    request_risk_upper_bound   decuwatch.finite NOT NULL CHECK (request_risk_upper_bound >= 0),
    request_risk_saturated     boolean NOT NULL,
    request_risk_mean_distance decuwatch.finite NOT NULL CHECK (request_risk_mean_distance >= 0),
    request_risk_distances     double precision[] NOT NULL CHECK (decuwatch.all_finite(request_risk_distances)),
    request_risk_shares        double precision[] NOT NULL CHECK (decuwatch.all_finite(request_risk_shares)),
    request_risk_branch_step   integer NOT NULL CHECK (request_risk_branch_step >= 0),
    request_risk_rollout_steps integer NOT NULL CHECK (request_risk_rollout_steps >= 0),
    profile                   text NOT NULL,
    steps                     integer NOT NULL CHECK (steps BETWEEN 0 AND 1000),
    guidance_scale            decuwatch.finite NOT NULL,
    eta                       decuwatch.finite NOT NULL,
    seed                      numeric(20, 0) NOT NULL CHECK (seed BETWEEN 0 AND 18446744073709551615),
    noise                     text NOT NULL,
    carrier                   integer NOT NULL CHECK (carrier >= 0),
    unet_rows                 integer NOT NULL CHECK (unet_rows >= 0),
    runtime                   text NOT NULL,
    device                    text NOT NULL,
    deviations                text[] NOT NULL,
    labels                    jsonb NOT NULL CHECK (jsonb_typeof(labels) = 'object'),
    requested                 jsonb NOT NULL,
    trace_parent              text,
    trace_state               text,
    scored_at                 timestamptz NOT NULL,
    recorded_at               timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (event_time, source, event_id, ensemble_digest)
) PARTITION BY RANGE (event_time);
CREATE INDEX scores_by_class ON decuwatch.scores (model, class_index, event_time DESC);
CREATE INDEX scores_by_labels ON decuwatch.scores USING gin (labels jsonb_path_ops);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.scores FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.scores IS 'One row for each event that was rerun through the ensemble: two measurements and the receipt from which they can be recomputed. Append-only, one partition a month of event time';
COMMENT ON COLUMN decuwatch.scores.event_time IS 'When the producer generated, from the event';
COMMENT ON COLUMN decuwatch.scores.source IS 'CloudEvents source of the event';
COMMENT ON COLUMN decuwatch.scores.event_id IS 'CloudEvents id, unique within the source';
COMMENT ON COLUMN decuwatch.scores.ensemble_digest IS 'SHA-256 of the manifest of the ensemble that scored';
COMMENT ON COLUMN decuwatch.scores.model IS 'Name of the ensemble that stands for the production model';
COMMENT ON COLUMN decuwatch.scores.settings IS 'Canonical key of the sampler and measurement settings; scores compare, and thresholds apply, only where it is equal';
COMMENT ON COLUMN decuwatch.scores.class_index IS 'Index of the class in the ensemble';
COMMENT ON COLUMN decuwatch.scores.class_label IS 'Label of the class in the ensemble';
COMMENT ON COLUMN decuwatch.scores.class_gap IS 'How little the ensemble knows the class: the estimate at the class measurement''s branch, in nats for the paide estimators';
COMMENT ON COLUMN decuwatch.scores.class_gap_estimator IS 'Estimator of class_gap: paide-w2, paide-kl, paide-bhattacharyya, mean-w2 or pixel-paide-w2';
COMMENT ON COLUMN decuwatch.scores.class_gap_upper_bound IS 'ln M for the paide estimators, 0 where there is no bound';
COMMENT ON COLUMN decuwatch.scores.class_gap_saturated IS 'class_gap is at its upper bound and ranks no more; class_gap_mean_distance does';
COMMENT ON COLUMN decuwatch.scores.class_gap_mean_distance IS 'Mean pairwise distance of the components, which cannot saturate';
COMMENT ON COLUMN decuwatch.scores.class_gap_distances IS 'M x M pairwise distances, zero diagonal';
COMMENT ON COLUMN decuwatch.scores.class_gap_shares IS 'Each component''s share of the distances; sums to 1. One large share is a broken table rather than a gap in the data';
COMMENT ON COLUMN decuwatch.scores.class_gap_branch_step IS 'Step at which the components left the shared path';
COMMENT ON COLUMN decuwatch.scores.class_gap_rollout_steps IS 'Steps that each component then took on its own path';
COMMENT ON COLUMN decuwatch.scores.request_risk IS 'How risky the request is within its class: the estimate at the request measurement''s branch, in nats for the paide estimators';
COMMENT ON COLUMN decuwatch.scores.request_risk_estimator IS 'Estimator of request_risk: paide-w2, paide-kl, paide-bhattacharyya, mean-w2 or pixel-paide-w2';
COMMENT ON COLUMN decuwatch.scores.request_risk_upper_bound IS 'ln M for the paide estimators, 0 where there is no bound';
COMMENT ON COLUMN decuwatch.scores.request_risk_saturated IS 'request_risk is at its upper bound and ranks no more; request_risk_mean_distance does';
COMMENT ON COLUMN decuwatch.scores.request_risk_mean_distance IS 'Mean pairwise distance of the components, which cannot saturate';
COMMENT ON COLUMN decuwatch.scores.request_risk_distances IS 'M x M pairwise distances, zero diagonal';
COMMENT ON COLUMN decuwatch.scores.request_risk_shares IS 'Each component''s share of the distances; sums to 1';
COMMENT ON COLUMN decuwatch.scores.request_risk_branch_step IS 'Step at which the components left the shared path';
COMMENT ON COLUMN decuwatch.scores.request_risk_rollout_steps IS 'Steps that each component then took on its own path';
COMMENT ON COLUMN decuwatch.scores.profile IS 'Scoring profile: fixed or as-requested';
COMMENT ON COLUMN decuwatch.scores.steps IS 'Sampler steps of the rerun';
COMMENT ON COLUMN decuwatch.scores.guidance_scale IS 'Classifier-free guidance of the rerun';
COMMENT ON COLUMN decuwatch.scores.eta IS 'DDIM eta of the rerun, 0 is deterministic';
COMMENT ON COLUMN decuwatch.scores.seed IS 'Seed of the first latent, unsigned 64-bit';
COMMENT ON COLUMN decuwatch.scores.noise IS 'Generator that drew the first latent of the rerun';
COMMENT ON COLUMN decuwatch.scores.carrier IS 'Component that carried the shared path, derived from the event''s identity';
COMMENT ON COLUMN decuwatch.scores.unet_rows IS 'Rows of U-Net work that the score cost';
COMMENT ON COLUMN decuwatch.scores.runtime IS 'Runtime and version that ran the graph';
COMMENT ON COLUMN decuwatch.scores.device IS 'Device that ran the graph: cpu or cuda';
COMMENT ON COLUMN decuwatch.scores.deviations IS 'Where the rerun could not follow the event; empty where it did';
COMMENT ON COLUMN decuwatch.scores.labels IS 'Labels of the event: tenant, region, ...; at most 16 strings';
COMMENT ON COLUMN decuwatch.scores.requested IS 'What the event asked for: class as it was named, noise and sampler where given';
COMMENT ON COLUMN decuwatch.scores.trace_parent IS 'W3C trace context of the producer';
COMMENT ON COLUMN decuwatch.scores.trace_state IS 'W3C trace state of the producer';
COMMENT ON COLUMN decuwatch.scores.scored_at IS 'When the score was computed';
COMMENT ON COLUMN decuwatch.scores.recorded_at IS 'When the score was written';

CREATE TABLE decuwatch.skips (
    source      text NOT NULL,
    event_id    text NOT NULL,
    event_time  timestamptz NOT NULL,
    model       text NOT NULL,
    class       text NOT NULL,
    reason      text NOT NULL CHECK (reason ~ '^[a-z0-9_]{1,64}$'),
    detail      text NOT NULL,
    labels      jsonb NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (source, event_id)
);
CREATE INDEX skips_by_recording ON decuwatch.skips (recorded_at);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.skips FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.skips IS 'Events that were deliberately not scored';
COMMENT ON COLUMN decuwatch.skips.source IS 'CloudEvents source of the event';
COMMENT ON COLUMN decuwatch.skips.event_id IS 'CloudEvents id, unique within the source';
COMMENT ON COLUMN decuwatch.skips.event_time IS 'When the producer generated, from the event';
COMMENT ON COLUMN decuwatch.skips.model IS 'Model that the event names';
COMMENT ON COLUMN decuwatch.skips.class IS 'Class as the event names it, index or label';
COMMENT ON COLUMN decuwatch.skips.reason IS 'Why, one of a few constants';
COMMENT ON COLUMN decuwatch.skips.detail IS 'Why, in words';
COMMENT ON COLUMN decuwatch.skips.labels IS 'Labels of the event';
COMMENT ON COLUMN decuwatch.skips.recorded_at IS 'When the skip was written';

CREATE TABLE decuwatch.dead_letters (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stream      text NOT NULL,
    sequence    bigint NOT NULL,
    digest      decuwatch.digest NOT NULL,
    delivered   integer NOT NULL,
    source      text,
    event_id    text,
    event_time  timestamptz,
    model       text,
    subject     text NOT NULL,
    payload     bytea NOT NULL CHECK (octet_length(payload) <= 65536),
    kind        text NOT NULL CHECK (kind ~ '^[a-z0-9_]{1,64}$'),
    field       text NOT NULL,
    reason      text NOT NULL CHECK (reason <> ''),
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (stream, sequence, digest),
    CHECK ((source IS NULL) = (event_id IS NULL) AND (source IS NULL) = (event_time IS NULL))
);
CREATE INDEX dead_letters_by_recording ON decuwatch.dead_letters (recorded_at);
CREATE INDEX dead_letters_by_event ON decuwatch.dead_letters (source, event_id) WHERE source IS NOT NULL;
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.dead_letters FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.dead_letters IS 'Messages that cannot be scored, with the reason for their producer';
COMMENT ON COLUMN decuwatch.dead_letters.id IS 'Number of the row';
COMMENT ON COLUMN decuwatch.dead_letters.stream IS 'JetStream stream of the message';
COMMENT ON COLUMN decuwatch.dead_letters.sequence IS 'Sequence of the message in the stream';
COMMENT ON COLUMN decuwatch.dead_letters.digest IS 'SHA-256 of the message; part of the key, since a stream that was made anew counts from 1 again';
COMMENT ON COLUMN decuwatch.dead_letters.delivered IS 'On which delivery the message was given up, from 1';
COMMENT ON COLUMN decuwatch.dead_letters.source IS 'CloudEvents source; NULL where the message could not be decoded';
COMMENT ON COLUMN decuwatch.dead_letters.event_id IS 'CloudEvents id; NULL where the message could not be decoded';
COMMENT ON COLUMN decuwatch.dead_letters.event_time IS 'Time of the event; NULL where the message could not be decoded';
COMMENT ON COLUMN decuwatch.dead_letters.model IS 'Model that the event names, else the one of the subject; NULL where neither tells';
COMMENT ON COLUMN decuwatch.dead_letters.subject IS 'NATS subject of the message';
COMMENT ON COLUMN decuwatch.dead_letters.payload IS 'The message''s payload, at most its first 64 KiB';
COMMENT ON COLUMN decuwatch.dead_letters.kind IS 'What is wrong, one of a few constants: invalid, unknown_model, unknown_class, duplicate_id, failed, ...';
COMMENT ON COLUMN decuwatch.dead_letters.field IS 'The field that is wrong, or empty';
COMMENT ON COLUMN decuwatch.dead_letters.reason IS 'What is wrong and what the bound is, in words';
COMMENT ON COLUMN decuwatch.dead_letters.recorded_at IS 'When the dead letter was written';

CREATE TABLE decuwatch.threshold_changes (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind    text NOT NULL CHECK (kind IN ('manual', 'calibration', 'reference', 'rollback')),
    undoes  bigint REFERENCES decuwatch.threshold_changes CHECK ((kind = 'rollback') = (undoes IS NOT NULL)),
    set_by  text NOT NULL CHECK (set_by <> ''),
    reason  text NOT NULL,
    set_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.threshold_changes FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.threshold_changes IS 'Who changed thresholds, when and why; all thresholds of one change took effect together';
COMMENT ON COLUMN decuwatch.threshold_changes.id IS 'Number of the change';
COMMENT ON COLUMN decuwatch.threshold_changes.kind IS 'manual, calibration, reference (from the ensemble''s manifest) or rollback';
COMMENT ON COLUMN decuwatch.threshold_changes.undoes IS 'The change that a rollback took back';
COMMENT ON COLUMN decuwatch.threshold_changes.set_by IS 'Who made the change';
COMMENT ON COLUMN decuwatch.threshold_changes.reason IS 'Why, in words';
COMMENT ON COLUMN decuwatch.threshold_changes.set_at IS 'When the change was written';

CREATE TABLE decuwatch.thresholds (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    change_id       bigint NOT NULL REFERENCES decuwatch.threshold_changes,
    model           text NOT NULL CHECK (length(model) BETWEEN 1 AND 64),
    ensemble_digest decuwatch.digest NOT NULL,
    settings        text NOT NULL CHECK (length(settings) BETWEEN 1 AND 1024),
    measurement     text NOT NULL CHECK (measurement IN ('class_gap', 'request_risk')),
    scope           text NOT NULL CHECK (scope IN ('class', 'cluster', 'model', 'limit')),
    class_index     integer CHECK (class_index >= 0),
    severity        text NOT NULL CHECK (severity IN ('warn', 'critical')),
    value           decuwatch.finite NOT NULL,
    distance        decuwatch.finite,
    withdrawn       boolean NOT NULL,
    origin          text NOT NULL CHECK (origin IN ('manual', 'calibrated', 'reference')),
    n               integer NOT NULL CHECK (n >= 0),
    alpha           decuwatch.finite CHECK (alpha > 0 AND alpha < 1),
    achieved        decuwatch.finite CHECK (achieved BETWEEN 0 AND 1),
    window_from     timestamptz,
    window_to       timestamptz,
    set_by          text NOT NULL CHECK (set_by <> ''),
    reason          text NOT NULL,
    set_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((scope IN ('class', 'cluster')) = (class_index IS NOT NULL)),
    CHECK (window_from <= window_to)
);
CREATE INDEX thresholds_by_key ON decuwatch.thresholds (model, ensemble_digest, settings, measurement, scope, class_index, severity, id DESC);
CREATE INDEX thresholds_by_change ON decuwatch.thresholds (change_id);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.thresholds FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.thresholds IS 'History of the thresholds, append-only: the newest row of a key (model, ensemble, settings, measurement, scope, class, severity) is in force unless it is withdrawn';
COMMENT ON COLUMN decuwatch.thresholds.id IS 'Number of the row; the newest of a key has the greatest';
COMMENT ON COLUMN decuwatch.thresholds.change_id IS 'The change that set it';
COMMENT ON COLUMN decuwatch.thresholds.model IS 'Model it belongs to';
COMMENT ON COLUMN decuwatch.thresholds.ensemble_digest IS 'Ensemble it belongs to; it says nothing about another one';
COMMENT ON COLUMN decuwatch.thresholds.settings IS 'Sampler and measurement settings it belongs to; it says nothing about others';
COMMENT ON COLUMN decuwatch.thresholds.measurement IS 'Measurement it bounds: class_gap or request_risk';
COMMENT ON COLUMN decuwatch.thresholds.scope IS 'class; cluster (of classes with similar scores); model; or limit (absolute, applies beside the others)';
COMMENT ON COLUMN decuwatch.thresholds.class_index IS 'Class it applies to, for the scopes class and cluster';
COMMENT ON COLUMN decuwatch.thresholds.severity IS 'Severity of the alert that it raises: warn or critical';
COMMENT ON COLUMN decuwatch.thresholds.value IS 'An alert fires where the measurement is at least this';
COMMENT ON COLUMN decuwatch.thresholds.distance IS 'Decides instead, on the mean pairwise distance, where the measurement is saturated';
COMMENT ON COLUMN decuwatch.thresholds.withdrawn IS 'The key has no threshold from here on';
COMMENT ON COLUMN decuwatch.thresholds.origin IS 'manual, calibrated (from stored scores) or reference (from the ensemble''s manifest)';
COMMENT ON COLUMN decuwatch.thresholds.n IS 'Scores it was calibrated from';
COMMENT ON COLUMN decuwatch.thresholds.alpha IS 'False-alarm rate that was wished for';
COMMENT ON COLUMN decuwatch.thresholds.achieved IS 'False-alarm rate that holds: the conformal p-value of the least uncertain score that it alerts on';
COMMENT ON COLUMN decuwatch.thresholds.window_from IS 'Begin of the window of event time it was calibrated from';
COMMENT ON COLUMN decuwatch.thresholds.window_to IS 'End of that window';
COMMENT ON COLUMN decuwatch.thresholds.set_by IS 'Who set it';
COMMENT ON COLUMN decuwatch.thresholds.reason IS 'Why, in words';
COMMENT ON COLUMN decuwatch.thresholds.set_at IS 'When it was set';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.tell_thresholds() RETURNS trigger LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    PERFORM pg_catalog.pg_notify('decuwatch_thresholds', '');
    RETURN NULL;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.tell_thresholds IS 'Tells the monitors that thresholds changed, at commit';
CREATE TRIGGER tell AFTER INSERT ON decuwatch.thresholds FOR EACH STATEMENT EXECUTE FUNCTION decuwatch.tell_thresholds();

CREATE TABLE decuwatch.alerts (
    id              text PRIMARY KEY CHECK (octet_length(id) BETWEEN 1 AND 256),
    kind            text NOT NULL CHECK (kind ~ '^[a-z0-9_]{1,64}$'),
    source          text NOT NULL,
    event_id        text NOT NULL,
    event_time      timestamptz NOT NULL,
    model           text NOT NULL,
    class_index     integer NOT NULL CHECK (class_index >= -1),
    class_label     text NOT NULL,
    labels          jsonb NOT NULL,
    severity        text NOT NULL CHECK (severity IN ('warn', 'critical')),
    reason          text NOT NULL CHECK (reason ~ '^[a-z0-9_]{1,64}$'),
    measurement     text NOT NULL CHECK (measurement IN ('class_gap', 'request_risk', '')),
    value           decuwatch.finite NOT NULL,
    decided         decuwatch.finite NOT NULL,
    threshold       decuwatch.finite NOT NULL,
    threshold_id    bigint NOT NULL,
    saturated       boolean NOT NULL,
    class_gap       decuwatch.finite NOT NULL,
    request_risk    decuwatch.finite NOT NULL,
    ensemble_digest text NOT NULL,
    settings        text NOT NULL,
    receipt         jsonb NOT NULL,
    count           integer NOT NULL CHECK (count >= 0),
    detail          text NOT NULL,
    fired_at        timestamptz NOT NULL,
    recorded_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    delivery        text NOT NULL DEFAULT 'owed' CHECK (delivery IN ('owed', 'class_budget', 'model_budget', 'cool_down'))
);
CREATE INDEX alerts_sent ON decuwatch.alerts (recorded_at) WHERE kind = 'score' AND delivery = 'owed';
CREATE INDEX alerts_held_back ON decuwatch.alerts (recorded_at) WHERE delivery <> 'owed';
CREATE INDEX alerts_by_time ON decuwatch.alerts (model, event_time DESC);
CREATE INDEX alerts_by_class ON decuwatch.alerts (model, class_index, event_time DESC);
CREATE INDEX alerts_by_event ON decuwatch.alerts (source, event_id);
CREATE INDEX alerts_by_recording ON decuwatch.alerts (recorded_at);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.alerts FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.alerts IS 'Alerts. One on a score is written in the transaction of the score';
COMMENT ON COLUMN decuwatch.alerts.id IS 'Derived from what the alert is about, so that it is the same on every try; also the CloudEvents id and the Nats-Msg-Id';
COMMENT ON COLUMN decuwatch.alerts.kind IS 'score; or summary, class_drift, canary_missed, threshold_missing';
COMMENT ON COLUMN decuwatch.alerts.source IS 'CloudEvents source of the event; empty where the alert is about no single event';
COMMENT ON COLUMN decuwatch.alerts.event_id IS 'CloudEvents id of the event; empty where the alert is about no single event';
COMMENT ON COLUMN decuwatch.alerts.event_time IS 'Time of the event';
COMMENT ON COLUMN decuwatch.alerts.model IS 'Model';
COMMENT ON COLUMN decuwatch.alerts.class_index IS 'Index of the class; -1 where the alert is about no single class';
COMMENT ON COLUMN decuwatch.alerts.class_label IS 'Label of the class';
COMMENT ON COLUMN decuwatch.alerts.labels IS 'Labels of the event';
COMMENT ON COLUMN decuwatch.alerts.severity IS 'warn or critical';
COMMENT ON COLUMN decuwatch.alerts.reason IS 'Why it fired, one of a few constants';
COMMENT ON COLUMN decuwatch.alerts.measurement IS 'class_gap or request_risk; empty where it is about neither';
COMMENT ON COLUMN decuwatch.alerts.value IS 'The measurement';
COMMENT ON COLUMN decuwatch.alerts.decided IS 'The number that was compared: the measurement, or its mean distance where saturated';
COMMENT ON COLUMN decuwatch.alerts.threshold IS 'The number that it was compared with';
COMMENT ON COLUMN decuwatch.alerts.threshold_id IS 'Row of thresholds that decided; 0 where none did';
COMMENT ON COLUMN decuwatch.alerts.saturated IS 'The measurement was at its upper bound';
COMMENT ON COLUMN decuwatch.alerts.class_gap IS 'Class gap of the score';
COMMENT ON COLUMN decuwatch.alerts.request_risk IS 'Request risk of the score';
COMMENT ON COLUMN decuwatch.alerts.ensemble_digest IS 'Ensemble that scored; empty where the alert is about no score';
COMMENT ON COLUMN decuwatch.alerts.settings IS 'Settings of the score; empty where the alert is about no score';
COMMENT ON COLUMN decuwatch.alerts.receipt IS 'Receipt of the score';
COMMENT ON COLUMN decuwatch.alerts.count IS 'How many alerts a summary stands for; 0 otherwise';
COMMENT ON COLUMN decuwatch.alerts.detail IS 'More, in words';
COMMENT ON COLUMN decuwatch.alerts.fired_at IS 'When it was decided';
COMMENT ON COLUMN decuwatch.alerts.recorded_at IS 'When it was written';
COMMENT ON COLUMN decuwatch.alerts.delivery IS 'owed: it went to the outbox; else why not: class_budget, model_budget or cool_down. A summary counts those of an hour';

CREATE TABLE decuwatch.outbox (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sink            text NOT NULL CHECK (sink ~ '^[a-z0-9_-]{1,64}$'),
    message_id      text NOT NULL,
    subject         text NOT NULL,
    headers         jsonb NOT NULL,
    body            bytea NOT NULL,
    attempts        integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_error      text NOT NULL DEFAULT '',
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    delivered_at    timestamptz,
    UNIQUE (sink, message_id)
);
CREATE INDEX outbox_pending ON decuwatch.outbox (sink, next_attempt_at) WHERE delivered_at IS NULL;
CREATE INDEX outbox_delivered ON decuwatch.outbox (delivered_at) WHERE delivered_at IS NOT NULL;
COMMENT ON TABLE decuwatch.outbox IS 'Deliveries that are owed to the sinks: written in the transaction of what they tell, delivered at least once';
COMMENT ON COLUMN decuwatch.outbox.id IS 'Number of the row';
COMMENT ON COLUMN decuwatch.outbox.sink IS 'Who gets it: jetstream, webhook, alertmanager';
COMMENT ON COLUMN decuwatch.outbox.message_id IS 'Key of the message, the same on every try: the alert''s id';
COMMENT ON COLUMN decuwatch.outbox.subject IS 'NATS subject';
COMMENT ON COLUMN decuwatch.outbox.headers IS 'NATS headers: name to list of values';
COMMENT ON COLUMN decuwatch.outbox.body IS 'Payload';
COMMENT ON COLUMN decuwatch.outbox.attempts IS 'How often a delivery was begun';
COMMENT ON COLUMN decuwatch.outbox.next_attempt_at IS 'Not before; in the future while a relay holds the row';
COMMENT ON COLUMN decuwatch.outbox.last_error IS 'Why the last attempt failed';
COMMENT ON COLUMN decuwatch.outbox.created_at IS 'When it was written';
COMMENT ON COLUMN decuwatch.outbox.delivered_at IS 'When the sink had it; NULL while it is owed';

CREATE TABLE decuwatch.class_hour_parts (
    hour                        timestamptz NOT NULL,
    model                       text NOT NULL,
    ensemble_digest             decuwatch.digest NOT NULL,
    settings                    text NOT NULL,
    class_index                 integer NOT NULL,
    class_label                 text NOT NULL,
    n                           bigint NOT NULL,
    class_gap_sum               decuwatch.finite NOT NULL,
    class_gap_squares           decuwatch.finite NOT NULL,
    class_gap_min               decuwatch.finite NOT NULL,
    class_gap_max               decuwatch.finite NOT NULL,
    class_gap_saturated         bigint NOT NULL,
    request_risk_sum            decuwatch.finite NOT NULL,
    request_risk_squares        decuwatch.finite NOT NULL,
    request_risk_min            decuwatch.finite NOT NULL,
    request_risk_max            decuwatch.finite NOT NULL,
    request_risk_saturated      bigint NOT NULL,
    warnings                    bigint NOT NULL,
    criticals                   bigint NOT NULL,
    folded                      boolean NOT NULL DEFAULT false
);
CREATE INDEX class_hour_parts_by_hour ON decuwatch.class_hour_parts (model, hour);
CREATE INDEX class_hour_parts_by_class ON decuwatch.class_hour_parts (model, class_index, hour);
CREATE INDEX class_hour_parts_unfolded ON decuwatch.class_hour_parts (hour) WHERE NOT folded;
COMMENT ON TABLE decuwatch.class_hour_parts IS 'Sums over scores by class and hour. Each commit adds rows, so that writers never wait for each other; maintenance folds the rows of a key into one. The view class_risk_hourly adds them up';
COMMENT ON COLUMN decuwatch.class_hour_parts.hour IS 'Begin of the hour of event time, UTC';
COMMENT ON COLUMN decuwatch.class_hour_parts.model IS 'Model';
COMMENT ON COLUMN decuwatch.class_hour_parts.ensemble_digest IS 'Ensemble that scored';
COMMENT ON COLUMN decuwatch.class_hour_parts.settings IS 'Settings of the scores';
COMMENT ON COLUMN decuwatch.class_hour_parts.class_index IS 'Index of the class';
COMMENT ON COLUMN decuwatch.class_hour_parts.class_label IS 'Label of the class';
COMMENT ON COLUMN decuwatch.class_hour_parts.n IS 'Scores';
COMMENT ON COLUMN decuwatch.class_hour_parts.class_gap_sum IS 'Sum of class_gap';
COMMENT ON COLUMN decuwatch.class_hour_parts.class_gap_squares IS 'Sum of squares of class_gap';
COMMENT ON COLUMN decuwatch.class_hour_parts.class_gap_min IS 'Least class_gap';
COMMENT ON COLUMN decuwatch.class_hour_parts.class_gap_max IS 'Greatest class_gap';
COMMENT ON COLUMN decuwatch.class_hour_parts.class_gap_saturated IS 'Scores whose class_gap is saturated';
COMMENT ON COLUMN decuwatch.class_hour_parts.request_risk_sum IS 'Sum of request_risk';
COMMENT ON COLUMN decuwatch.class_hour_parts.request_risk_squares IS 'Sum of squares of request_risk';
COMMENT ON COLUMN decuwatch.class_hour_parts.request_risk_min IS 'Least request_risk';
COMMENT ON COLUMN decuwatch.class_hour_parts.request_risk_max IS 'Greatest request_risk';
COMMENT ON COLUMN decuwatch.class_hour_parts.request_risk_saturated IS 'Scores whose request_risk is saturated';
COMMENT ON COLUMN decuwatch.class_hour_parts.warnings IS 'Scores that raised a warning';
COMMENT ON COLUMN decuwatch.class_hour_parts.criticals IS 'Scores that raised a critical alert';
COMMENT ON COLUMN decuwatch.class_hour_parts.folded IS 'The row came out of folding, not out of a commit';

CREATE TABLE decuwatch.class_day_parts (LIKE decuwatch.class_hour_parts INCLUDING DEFAULTS INCLUDING COMMENTS INCLUDING CONSTRAINTS);
ALTER TABLE decuwatch.class_day_parts RENAME COLUMN hour TO day;
CREATE INDEX class_day_parts_by_day ON decuwatch.class_day_parts (model, day);
CREATE INDEX class_day_parts_by_class ON decuwatch.class_day_parts (model, class_index, day);
CREATE INDEX class_day_parts_unfolded ON decuwatch.class_day_parts (day) WHERE NOT folded;
COMMENT ON TABLE decuwatch.class_day_parts IS 'Sums over scores by class and day, kept as class_hour_parts is. The view class_risk_daily adds them up';
COMMENT ON COLUMN decuwatch.class_day_parts.day IS 'Begin of the day of event time, UTC';

CREATE TABLE decuwatch.outcome_hour_parts (
    hour    timestamptz NOT NULL,
    model   text NOT NULL,
    outcome text NOT NULL,
    reason  text NOT NULL,
    n       bigint NOT NULL,
    folded  boolean NOT NULL DEFAULT false
);
CREATE INDEX outcome_hour_parts_by_hour ON decuwatch.outcome_hour_parts (hour, model);
CREATE INDEX outcome_hour_parts_unfolded ON decuwatch.outcome_hour_parts (hour) WHERE NOT folded;
COMMENT ON TABLE decuwatch.outcome_hour_parts IS 'Counts of verdicts by hour, kept as class_hour_parts is. The view coverage adds them up';
COMMENT ON COLUMN decuwatch.outcome_hour_parts.hour IS 'Begin of the hour of event time, UTC; of the recording where a dead letter has no event time';
COMMENT ON COLUMN decuwatch.outcome_hour_parts.model IS 'Model; empty where a dead letter names none';
COMMENT ON COLUMN decuwatch.outcome_hour_parts.outcome IS 'score, skip or dead_letter';
COMMENT ON COLUMN decuwatch.outcome_hour_parts.reason IS 'Reason of a skip, kind of a dead letter; empty for a score';
COMMENT ON COLUMN decuwatch.outcome_hour_parts.n IS 'Verdicts';
COMMENT ON COLUMN decuwatch.outcome_hour_parts.folded IS 'The row came out of folding, not out of a commit';

-- The two functions below run as the owner, so that the writer can keep partitions without owning the table.

-- +goose StatementBegin
CREATE FUNCTION decuwatch.ensure_partition(moment timestamptz) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' SET timezone = 'UTC' AS $$
DECLARE
    month   timestamptz := date_trunc('month', moment, 'UTC');
    name    text := 'scores_' || to_char(month, 'YYYY_MM');
BEGIN
    IF month < '2019-12-01' OR month > now() + interval '2 years' THEN
        RAISE EXCEPTION 'no partition for %: scores lie between 2020 and two years from now', moment USING ERRCODE = 'check_violation';
    END IF;
    IF to_regclass(format('decuwatch.%I', name)) IS NOT NULL THEN
        RETURN false;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('decuwatch.ensure_partition'));
    -- Not to_regclass: its cache may still say what was true before the lock.
    IF EXISTS (SELECT FROM pg_class WHERE relnamespace = 'decuwatch'::regnamespace AND relname = name) THEN
        RETURN false;
    END IF;
    -- LIKE copies the columns' comments, which PARTITION OF would not; ATTACH locks the table less than PARTITION OF.
    EXECUTE format('CREATE TABLE decuwatch.%I (LIKE decuwatch.scores INCLUDING ALL)', name);
    EXECUTE format('COMMENT ON TABLE decuwatch.%I IS %L', name, 'Scores of ' || to_char(month, 'YYYY-MM') || ', a partition of scores');
    EXECUTE format('ALTER TABLE decuwatch.scores ATTACH PARTITION decuwatch.%I FOR VALUES FROM (%L) TO (%L)', name, month, month + interval '1 month');
    RETURN true;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.ensure_partition IS 'Creates the partition of scores for the month of a moment; false where it is there';

-- +goose StatementBegin
CREATE FUNCTION decuwatch.drop_partitions(before timestamptz) RETURNS text[]
    -- A drop waits for queries on the table, and writers wait for the drop: rather try again later.
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' SET timezone = 'UTC' SET lock_timeout = '500ms' AS $$
DECLARE
    partition text;
    dropped   text[] := '{}';
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('decuwatch.ensure_partition'));
    FOR partition IN
        SELECT c.oid::regclass::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'decuwatch.scores'::regclass AND c.relname ~ '^scores_[0-9]{4}_[0-9]{2}$'
          AND to_timestamp(substring(c.relname FROM 8), 'YYYY_MM') + interval '1 month' <= before
        ORDER BY c.relname
    LOOP
        EXECUTE format('DROP TABLE %s', partition);
        dropped := dropped || partition;
    END LOOP;
    RETURN dropped;
END $$;
-- +goose StatementEnd
COMMENT ON FUNCTION decuwatch.drop_partitions IS 'Drops the partitions of scores that end at or before a moment and returns their names';

COMMENT ON TABLE decuwatch.migrations IS 'Migrations of this schema that were applied';
COMMENT ON COLUMN decuwatch.migrations.id IS 'Number of the row';
COMMENT ON COLUMN decuwatch.migrations.version_id IS 'Number of the migration';
COMMENT ON COLUMN decuwatch.migrations.is_applied IS 'true: applied';
COMMENT ON COLUMN decuwatch.migrations.tstamp IS 'When';

-- +goose Down
DROP FUNCTION decuwatch.drop_partitions;
DROP FUNCTION decuwatch.ensure_partition;
DROP TABLE decuwatch.outcome_hour_parts;
DROP TABLE decuwatch.class_day_parts;
DROP TABLE decuwatch.class_hour_parts;
DROP TABLE decuwatch.outbox;
DROP TABLE decuwatch.alerts;
DROP TABLE decuwatch.thresholds;
DROP FUNCTION decuwatch.tell_thresholds;
DROP TABLE decuwatch.threshold_changes;
DROP TABLE decuwatch.dead_letters;
DROP TABLE decuwatch.skips;
DROP TABLE decuwatch.scores;
DROP TABLE decuwatch.events;
DROP FUNCTION decuwatch.refuse_update;
DROP FUNCTION decuwatch.all_finite;
DROP DOMAIN decuwatch.digest;
DROP DOMAIN decuwatch.finite;

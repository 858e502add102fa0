-- +goose Up
-- The third measurement, what the others were made of, and the data that the classes stand on. Columns that are added to
-- scores are NULL in rows that are there, so their constraint need not look at these.
ALTER TABLE decuwatch.scores
    ADD COLUMN class_gap_tables text,
    ADD COLUMN class_gap_guidance text,
    ADD COLUMN class_gap_steps integer,
    ADD COLUMN request_risk_tables text,
    ADD COLUMN request_risk_guidance text,
    ADD COLUMN request_risk_steps integer,
    ADD COLUMN image_risk double precision,
    ADD COLUMN image_risk_reason text,
    ADD COLUMN image_risk_top jsonb,
    ADD COLUMN image_risk_estimator text,
    ADD COLUMN image_risk_upper_bound double precision,
    ADD COLUMN image_risk_tables text,
    ADD COLUMN image_risk_guidance text,
    ADD COLUMN image_risk_steps integer,
    ADD COLUMN image_risk_branch_step integer,
    ADD COLUMN image_risk_rollout_steps integer,
    ADD COLUMN class_images integer,
    ADD COLUMN class_n_eff double precision,
    ADD COLUMN class_draws integer,
    ADD CONSTRAINT scores_image_risk CHECK (
        image_risk BETWEEN 0 AND 1
        AND (image_risk IS NULL OR image_risk_reason IS NULL)
        AND (image_risk IS NULL) = (image_risk_estimator IS NULL)
        AND image_risk_reason IN ('no_judge', 'judge_cannot_tell')
        AND image_risk_upper_bound < 'Infinity'
        AND jsonb_typeof(image_risk_top) = 'array'
    ) NOT VALID,
    ADD CONSTRAINT scores_class_data CHECK (
        class_images >= 0 AND class_draws >= 0 AND class_n_eff >= 0 AND class_n_eff < 'Infinity'
    ) NOT VALID;
COMMENT ON TABLE decuwatch.scores IS
    'One row for each event that was rerun through the ensemble: its measurements, and the receipt from which they can be recomputed. Append-only, one partition a month of event time';

ALTER TABLE decuwatch.thresholds
    DROP CONSTRAINT thresholds_measurement_check,
    ADD CONSTRAINT thresholds_measurement_check CHECK (measurement IN ('class_gap', 'request_risk', 'image_risk'));
COMMENT ON COLUMN decuwatch.thresholds.measurement IS 'Measurement it bounds: class_gap, request_risk or image_risk';
COMMENT ON COLUMN decuwatch_views.thresholds_now.measurement IS 'Measurement it bounds: class_gap, request_risk or image_risk';
COMMENT ON COLUMN decuwatch_views.threshold_history.measurement IS 'Measurement it bounds: class_gap, request_risk or image_risk';

ALTER TABLE decuwatch.alerts
    ADD COLUMN image_risk double precision CHECK (image_risk BETWEEN 0 AND 1),
    DROP CONSTRAINT alerts_measurement_check,
    ADD CONSTRAINT alerts_measurement_check CHECK (measurement IN ('class_gap', 'request_risk', 'image_risk', ''));
COMMENT ON COLUMN decuwatch.alerts.measurement IS 'class_gap, request_risk or image_risk; empty if the alert is about no measurement';

ALTER TABLE decuwatch.class_hour_parts
    ADD COLUMN image_risk_n bigint NOT NULL DEFAULT 0,
    ADD COLUMN image_risk_sum double precision NOT NULL DEFAULT 0 CHECK (image_risk_sum < 'Infinity'),
    ADD COLUMN image_risk_squares double precision NOT NULL DEFAULT 0 CHECK (image_risk_squares < 'Infinity'),
    ADD COLUMN image_risk_min double precision CHECK (image_risk_min < 'Infinity'),
    ADD COLUMN image_risk_max double precision CHECK (image_risk_max < 'Infinity');
ALTER TABLE decuwatch.class_day_parts
    ADD COLUMN image_risk_n bigint NOT NULL DEFAULT 0,
    ADD COLUMN image_risk_sum double precision NOT NULL DEFAULT 0 CHECK (image_risk_sum < 'Infinity'),
    ADD COLUMN image_risk_squares double precision NOT NULL DEFAULT 0 CHECK (image_risk_squares < 'Infinity'),
    ADD COLUMN image_risk_min double precision CHECK (image_risk_min < 'Infinity'),
    ADD COLUMN image_risk_max double precision CHECK (image_risk_max < 'Infinity');

CREATE TABLE decuwatch.class_data (
    model                 text NOT NULL CHECK (length(model) BETWEEN 1 AND 64),
    ensemble_digest       decuwatch.digest NOT NULL,
    class_index           integer NOT NULL CHECK (class_index >= 0),
    class_label           text NOT NULL CHECK (length(class_label) <= 128),
    draws                 bigint CHECK (draws >= 0),
    class_gap             decuwatch.finite CHECK (class_gap > 0),
    images                bigint CHECK (images >= 0),
    distinct_images       bigint CHECK (distinct_images >= 0),
    n_eff                 decuwatch.finite CHECK (n_eff >= 0),
    near_duplicates       bigint CHECK (near_duplicates >= 0),
    near_duplicate_groups bigint CHECK (near_duplicate_groups >= 0),
    neighbor_label_share  decuwatch.finite CHECK (neighbor_label_share BETWEEN 0 AND 1),
    likely_mislabeled     bigint CHECK (likely_mislabeled >= 0),
    outliers              bigint CHECK (outliers >= 0),
    judge_accuracy        decuwatch.finite CHECK (judge_accuracy BETWEEN 0 AND 1),
    judge_held_out        bigint CHECK (judge_held_out >= 0),
    recorded_at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (model, ensemble_digest, class_index)
);
CREATE TRIGGER append_only BEFORE UPDATE ON decuwatch.class_data
    FOR EACH ROW EXECUTE FUNCTION decuwatch.refuse_update();
COMMENT ON TABLE decuwatch.class_data IS
    'What the manifest of an ensemble says about its classes: their training images and how they were trained. A monitor writes the rows of its ensembles when it starts';
COMMENT ON COLUMN decuwatch.class_data.model IS 'Model that the ensemble stands for';
COMMENT ON COLUMN decuwatch.class_data.ensemble_digest IS 'SHA-256 of the manifest of the ensemble';
COMMENT ON COLUMN decuwatch.class_data.class_index IS 'Index of the class in the ensemble';
COMMENT ON COLUMN decuwatch.class_data.class_label IS 'Label of the class in the ensemble';
COMMENT ON COLUMN decuwatch.class_data.draws IS 'Training examples that the producer''s row of the class was drawn for; NULL if the ensemble does not say';
COMMENT ON COLUMN decuwatch.class_data.class_gap IS 'Mean distance of class_gap that the closed form expects; NULL if the ensemble does not say';
COMMENT ON COLUMN decuwatch.class_data.images IS 'Training images of the class; NULL, like the columns that follow, without a data card';
COMMENT ON COLUMN decuwatch.class_data.distinct_images IS 'Images that differ from each other in some byte';
COMMENT ON COLUMN decuwatch.class_data.n_eff IS 'How many different images the images of the class are worth';
COMMENT ON COLUMN decuwatch.class_data.near_duplicates IS 'Images that have a near duplicate in the class';
COMMENT ON COLUMN decuwatch.class_data.near_duplicate_groups IS 'Groups of near duplicates';
COMMENT ON COLUMN decuwatch.class_data.neighbor_label_share IS 'Share of the nearest neighbors of the images that have the label of the class; NULL if it was not measured';
COMMENT ON COLUMN decuwatch.class_data.likely_mislabeled IS 'Images whose neighbors have other labels';
COMMENT ON COLUMN decuwatch.class_data.outliers IS 'Images that are far from all others';
COMMENT ON COLUMN decuwatch.class_data.judge_accuracy IS 'Share of held-out images of the class that the judge names; NULL without a judge, or if it was not measured';
COMMENT ON COLUMN decuwatch.class_data.judge_held_out IS 'Images on which judge_accuracy was measured';
COMMENT ON COLUMN decuwatch.class_data.recorded_at IS 'When the row was written';

CREATE VIEW decuwatch_views.class_data AS
SELECT model, ensemble_digest, class_index, class_label, draws, class_gap::double precision AS class_gap, images,
    distinct_images, n_eff::double precision AS n_eff, near_duplicates, near_duplicate_groups,
    neighbor_label_share::double precision AS neighbor_label_share, likely_mislabeled, outliers,
    judge_accuracy::double precision AS judge_accuracy, judge_held_out, recorded_at
FROM decuwatch.class_data;
COMMENT ON VIEW decuwatch_views.class_data IS
    'Training data of each class of each ensemble, from its manifest: how many images it has, what they are worth, and how many look wrong';

-- What a column of a measurement means, for each measurement that has it.
-- +goose StatementBegin
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN
        SELECT v.name || v.suffix AS column, replace(v.comment, '%', v.name) AS comment, t.name AS table
        FROM (
            SELECT m.name, x.suffix, x.comment, x.kind
            FROM (VALUES ('class_gap'), ('request_risk'), ('image_risk')) m (name),
            (VALUES
                ('scores', '_tables', 'Tables whose paths % was measured on: members, posterior or producer; NULL in older rows, and if it was not measured'),
                ('scores', '_guidance', 'Guidance of these paths: own (each table has its unconditional row) or shared; NULL in older rows, and if % was not measured'),
                ('scores', '_steps', 'Sampler steps that these paths are a part of; NULL in older rows, and if % was not measured'),
                ('scores', '_estimator', 'Estimator of %; NULL if it was not measured'),
                ('scores', '_upper_bound', 'Greatest possible %; NULL if it was not measured'),
                ('scores', '_branch_step', 'Step at which the path left the shared path; NULL if % was not measured'),
                ('scores', '_rollout_steps', 'Steps that were then taken; NULL if % was not measured'),
                ('parts', '_n', 'Scores whose % was measured'),
                ('parts', '_sum', 'Sum of %'),
                ('parts', '_squares', 'Sum of squares of %'),
                ('parts', '_min', 'Least %; NULL if it was not measured'),
                ('parts', '_max', 'Greatest %; NULL if it was not measured')
            ) x (kind, suffix, comment)
        ) v
        JOIN (VALUES ('scores', 'scores'), ('parts', 'class_hour_parts'), ('parts', 'class_day_parts')) t (kind, name) USING (kind)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = ('decuwatch.' || t.name)::regclass AND a.attname = v.name || v.suffix
        WHERE pg_catalog.col_description(a.attrelid, a.attnum) IS NULL
    LOOP
        EXECUTE format('COMMENT ON COLUMN decuwatch.%I.%I IS %L', c.table, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd
COMMENT ON COLUMN decuwatch.scores.image_risk IS
    'How likely the image is not of the class asked for: 1 minus the probability that the judge gives the class. NULL if it was not measured: image_risk_reason says why';
COMMENT ON COLUMN decuwatch.scores.image_risk_reason IS
    'Why image_risk is NULL: no_judge, or judge_cannot_tell (the judge is too often wrong about the class). NULL if it was measured, and in rows that are older than the column';
COMMENT ON COLUMN decuwatch.scores.image_risk_top IS
    'The classes that the judge finds most likely, the most likely first: class is the index, probability is theirs';
COMMENT ON COLUMN decuwatch.scores.class_images IS 'Training images of the class, which class_gap stands on; NULL or 0 if the ensemble does not say';
COMMENT ON COLUMN decuwatch.scores.class_n_eff IS 'How many different images these are worth; NULL or 0 if the ensemble does not say';
COMMENT ON COLUMN decuwatch.scores.class_draws IS 'Training examples that the producer''s row of the class was drawn for; NULL or 0 if the ensemble does not say';
COMMENT ON COLUMN decuwatch.alerts.image_risk IS 'Image risk of the score; NULL if it was not measured';

-- The views show the new columns after the others.
CREATE OR REPLACE VIEW decuwatch.production_scores AS
SELECT s.* FROM decuwatch.scores s
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model
);
CREATE OR REPLACE VIEW decuwatch.production_alerts AS
SELECT a.* FROM decuwatch.alerts a
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = a.source AND c.event_id = a.event_id AND c.model = a.model
);

CREATE OR REPLACE VIEW decuwatch_views.scores AS
SELECT event_time, source, event_id, model, ensemble_digest, settings, class_index, class_label, labels,
    class_gap::double precision AS class_gap, class_gap_estimator,
    class_gap_upper_bound::double precision AS class_gap_upper_bound, class_gap_saturated,
    class_gap_mean_distance::double precision AS class_gap_mean_distance, class_gap_distances, class_gap_shares,
    request_risk::double precision AS request_risk, request_risk_estimator,
    request_risk_upper_bound::double precision AS request_risk_upper_bound, request_risk_saturated,
    request_risk_mean_distance::double precision AS request_risk_mean_distance, request_risk_distances,
    request_risk_shares, profile, steps, guidance_scale::double precision AS guidance_scale,
    eta::double precision AS eta, seed, noise, carrier, unet_rows, runtime, device, deviations, requested, scored_at,
    recorded_at,
    image_risk, image_risk_reason, image_risk_top, image_risk_estimator,
    class_gap_tables, class_gap_guidance, class_gap_steps, request_risk_tables, request_risk_guidance,
    request_risk_steps, image_risk_tables, image_risk_guidance, image_risk_steps, class_images, class_n_eff, class_draws
FROM decuwatch.scores;
COMMENT ON VIEW decuwatch_views.scores IS 'One row for each event that was scored: class, labels, all measurements, receipt';

CREATE OR REPLACE VIEW decuwatch_views.production_scores AS
SELECT s.* FROM decuwatch_views.scores s
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model
);

CREATE OR REPLACE VIEW decuwatch_views.alerts AS
SELECT a.id, a.kind, a.source, a.event_id, a.event_time, a.model, a.ensemble_digest, a.settings, a.class_index,
    a.class_label, a.labels, a.severity, a.reason, a.measurement, a.value::double precision AS value,
    a.decided::double precision AS decided, a.threshold::double precision AS threshold, a.threshold_id, a.saturated,
    a.class_gap::double precision AS class_gap, a.request_risk::double precision AS request_risk, a.receipt, a.count,
    a.detail, a.fired_at, a.recorded_at, a.delivery, r.state AS review_state, r.verdict AS review_verdict,
    r.assignee AS review_assignee, r.resolved_at AS review_resolved_at, a.image_risk
FROM decuwatch.alerts a LEFT JOIN decuwatch.reviews r ON r.alert_id = a.id;

CREATE OR REPLACE VIEW decuwatch_views.production_alerts AS
SELECT a.* FROM decuwatch_views.alerts a
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = a.source AND c.event_id = a.event_id AND c.model = a.model
);

-- One view over both rollups would not use their indexes, so the same text is executed for each.
-- +goose StatementBegin
DO $$
DECLARE
    span record;
BEGIN
    FOR span IN SELECT * FROM (VALUES
        ('hour', 'class_hour_parts', 'class_risk_hourly'), ('day', 'class_day_parts', 'class_risk_daily')
    ) t (name, parts, view) LOOP
        EXECUTE format('
            CREATE OR REPLACE VIEW decuwatch_views.%3$I AS
            SELECT %1$I, model, ensemble_digest, settings, class_index, class_label,
                n::bigint,
                class_gap_sum / n AS class_gap_mean,
                CASE WHEN n > 1 THEN sqrt(greatest(0, (class_gap_squares - class_gap_sum ^ 2 / n) / (n - 1))) END
                    AS class_gap_sd,
                class_gap_min, class_gap_max, class_gap_saturated,
                request_risk_sum / n AS request_risk_mean,
                CASE WHEN n > 1 THEN sqrt(greatest(0, (request_risk_squares - request_risk_sum ^ 2 / n) / (n - 1))) END
                    AS request_risk_sd,
                request_risk_min, request_risk_max, request_risk_saturated,
                warnings, criticals,
                image_risk_n::bigint,
                CASE WHEN image_risk_n > 0 THEN image_risk_sum / image_risk_n END AS image_risk_mean,
                CASE WHEN image_risk_n > 1 THEN sqrt(greatest(0,
                    (image_risk_squares - image_risk_sum ^ 2 / image_risk_n) / (image_risk_n - 1))) END
                    AS image_risk_sd,
                image_risk_min, image_risk_max
            FROM (
                SELECT %1$I, model, ensemble_digest, settings, class_index, class_label,
                    sum(n)::double precision AS n,
                    sum(class_gap_sum) AS class_gap_sum, sum(class_gap_squares) AS class_gap_squares,
                    min(class_gap_min)::double precision AS class_gap_min,
                    max(class_gap_max)::double precision AS class_gap_max,
                    sum(class_gap_saturated)::bigint AS class_gap_saturated,
                    sum(request_risk_sum) AS request_risk_sum, sum(request_risk_squares) AS request_risk_squares,
                    min(request_risk_min)::double precision AS request_risk_min,
                    max(request_risk_max)::double precision AS request_risk_max,
                    sum(request_risk_saturated)::bigint AS request_risk_saturated,
                    sum(image_risk_n)::double precision AS image_risk_n,
                    sum(image_risk_sum) AS image_risk_sum, sum(image_risk_squares) AS image_risk_squares,
                    min(image_risk_min) AS image_risk_min, max(image_risk_max) AS image_risk_max,
                    sum(warnings)::bigint AS warnings, sum(criticals)::bigint AS criticals
                FROM decuwatch.%2$I
                GROUP BY %1$I, model, ensemble_digest, settings, class_index, class_label
            ) sums', span.name, span.parts, span.view);
        EXECUTE format('COMMENT ON COLUMN decuwatch_views.%I.image_risk_mean IS %L', span.view,
            'Mean of image_risk, over the scores that have it; NULL if it was not measured');
        EXECUTE format('COMMENT ON COLUMN decuwatch_views.%I.image_risk_sd IS %L', span.view,
            'Standard deviation of image_risk; NULL for one score');
    END LOOP;
END $$;
-- +goose StatementEnd

-- One row for each measurement of a score that was measured: a new measurement is one more line here.
CREATE VIEW decuwatch.production_measurements AS
SELECT s.model, s.ensemble_digest, s.settings, s.class_index, s.event_time, s.source, s.event_id,
    m.measurement, m.value, m.mean_distance, m.saturated
FROM decuwatch.production_scores s,
LATERAL (VALUES
    ('class_gap', s.class_gap::double precision, s.class_gap_mean_distance::double precision, s.class_gap_saturated),
    ('request_risk', s.request_risk, s.request_risk_mean_distance, s.request_risk_saturated),
    ('image_risk', s.image_risk, 0, false)
) m (measurement, value, mean_distance, saturated)
WHERE m.value IS NOT NULL;
COMMENT ON VIEW decuwatch.production_measurements IS
    'The measurements of scores without those of canaries, one row for each: thresholds and statistics are made of them. What was not measured has no row';
COMMENT ON COLUMN decuwatch.production_measurements.measurement IS 'class_gap, request_risk or image_risk';
COMMENT ON COLUMN decuwatch.production_measurements.value IS 'The measurement';
COMMENT ON COLUMN decuwatch.production_measurements.mean_distance IS 'Its mean pairwise distance; 0 for image_risk';
COMMENT ON COLUMN decuwatch.production_measurements.saturated IS 'It is at its upper bound';

-- A column of a view or a partition means what the column of the table means that it comes from.
-- +goose StatementBegin
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN
        SELECT v.oid::regclass AS view, va.attname AS column, pg_catalog.col_description(t.oid, ta.attnum) AS comment
        FROM (
            VALUES ('decuwatch_views.scores', 'decuwatch.scores'), ('decuwatch_views.alerts', 'decuwatch.alerts'),
            ('decuwatch_views.production_scores', 'decuwatch.scores'),
            ('decuwatch_views.production_alerts', 'decuwatch.alerts'),
            ('decuwatch.production_scores', 'decuwatch.scores'), ('decuwatch.production_alerts', 'decuwatch.alerts'),
            ('decuwatch.production_measurements', 'decuwatch.scores'),
            ('decuwatch_views.class_risk_hourly', 'decuwatch.class_hour_parts'),
            ('decuwatch_views.class_risk_daily', 'decuwatch.class_day_parts'),
            ('decuwatch_views.class_data', 'decuwatch.class_data')
            UNION ALL
            SELECT inhrelid::regclass::text, 'decuwatch.scores' FROM pg_catalog.pg_inherits
            WHERE inhparent = 'decuwatch.scores'::regclass
        ) x (view, source)
        JOIN pg_catalog.pg_class v ON v.oid = x.view::regclass
        JOIN pg_catalog.pg_class t ON t.oid = x.source::regclass
        JOIN pg_catalog.pg_attribute va ON va.attrelid = v.oid AND va.attnum > 0
        JOIN pg_catalog.pg_attribute ta ON ta.attrelid = t.oid AND ta.attname = va.attname
        WHERE pg_catalog.col_description(v.oid, va.attnum) IS NULL OR va.attname = 'measurement'
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', c.view, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd

-- What is folded follows from the columns: the ends are ends, everything else that is no key is a sum.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION decuwatch.fold() RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    parts record;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('decuwatch.fold')) THEN
        RETURN false;
    END IF;
    FOR parts IN
        SELECT t.name, t.keys, string_agg(quote_ident(attname), ', ' ORDER BY attnum) AS columns,
            string_agg(format(CASE right(attname, 4) WHEN '_min' THEN 'min(%I)' WHEN '_max' THEN 'max(%I)'
                ELSE 'sum(%I)' END, attname), ', ' ORDER BY attnum) AS folded
        FROM (VALUES
            ('class_hour_parts', 'hour, model, ensemble_digest, settings, class_index, class_label'),
            ('class_day_parts', 'day, model, ensemble_digest, settings, class_index, class_label'),
            ('outcome_hour_parts', 'hour, model, outcome, reason')
        ) t (name, keys)
        JOIN pg_attribute ON attrelid = ('decuwatch.' || t.name)::regclass AND attnum > 0 AND NOT attisdropped
        WHERE attname <> ALL (string_to_array(t.keys, ', ')) AND attname <> 'folded'
        GROUP BY t.name, t.keys
    LOOP
        EXECUTE format('
            WITH keys AS (
                SELECT DISTINCT %2$s FROM decuwatch.%1$I WHERE NOT folded
            ), gone AS (
                DELETE FROM decuwatch.%1$I p USING keys
                WHERE (%5$s) = (%6$s)
                RETURNING p.*
            )
            INSERT INTO decuwatch.%1$I (%2$s, %3$s, folded)
            SELECT %2$s, %4$s, true FROM gone GROUP BY %2$s',
            parts.name, parts.keys, parts.columns, parts.folded,
            regexp_replace(parts.keys, '(\w+)', 'p.\1', 'g'), regexp_replace(parts.keys, '(\w+)', 'keys.\1', 'g'));
    END LOOP;
    RETURN true;
END $$;
-- +goose StatementEnd

GRANT SELECT, INSERT ON decuwatch.class_data TO decuwatch_writer;
GRANT SELECT ON decuwatch.production_measurements TO decuwatch_writer;
GRANT SELECT ON decuwatch_views.class_data TO decuwatch_reader, decuwatch_writer;

-- +goose Down
-- Columns of older tables and views go with these: migrations are only taken back all together.
DROP VIEW decuwatch_views.class_data, decuwatch.production_measurements;
DROP TABLE decuwatch.class_data;

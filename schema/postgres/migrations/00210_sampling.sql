-- +goose Up
-- How likely an event was to be scored. Estimates over traffic weigh by the inverse (Horvitz and Thompson, 1952). Rows that
-- are there were scored for sure, so their constraint need not look at them.
ALTER TABLE decuwatch.scores
    ADD COLUMN inclusion_probability double precision NOT NULL DEFAULT 1,
    ADD CONSTRAINT scores_inclusion_probability
        CHECK (inclusion_probability > 0 AND inclusion_probability <= 1) NOT VALID;
ALTER TABLE decuwatch.skips
    ADD COLUMN inclusion_probability double precision,
    ADD CONSTRAINT skips_inclusion_probability
        CHECK (inclusion_probability >= 0 AND inclusion_probability < 1) NOT VALID,
    ADD CONSTRAINT skips_sampled_out
        CHECK ((reason = 'sampled_out') = (inclusion_probability IS NOT NULL)) NOT VALID;
COMMENT ON COLUMN decuwatch.scores.inclusion_probability IS
    'Probability with which the event was selected for scoring; 1 without sampling. The score stands for 1 / inclusion_probability requests';
COMMENT ON COLUMN decuwatch.skips.inclusion_probability IS
    'Probability with which the event would have been scored, if the reason is sampled_out; NULL if no lot decided';
COMMENT ON COLUMN decuwatch.skips.reason IS
    'Why: sampler, noise or settings cannot be rerun; sampled_out by lot; budget: the model''s rows were used up';

-- The sums of a measurement become sums of x / p. Without sampling they are what they were.
-- +goose StatementBegin
DO $$
DECLARE
    parts text;
    c record;
BEGIN
    FOREACH parts IN ARRAY ARRAY['class_hour_parts', 'class_day_parts'] LOOP
        FOR c IN
            SELECT t.prefix || s.suffix AS name, replace(s.comment, '%', t.what) AS comment
            FROM (VALUES ('', 'all scores'), ('warnings_', 'scores with a warning'),
                ('criticals_', 'scores with a critical alert'), ('class_gap_', 'scores whose class_gap was measured'),
                ('request_risk_', 'scores whose request_risk was measured'),
                ('image_risk_', 'scores whose image_risk was measured')) t (prefix, what),
            (VALUES ('extra', 'Requests that were not scored, for which these stand: sum of 1/p - 1 over %'),
                ('variance', 'Variance of the number of requests: sum of v = (1 - p) / p^2 over %')) s (suffix, comment)
            UNION ALL
            SELECT m || s.suffix, replace(s.comment, '%', m)
            FROM unnest(ARRAY['class_gap', 'request_risk', 'image_risk']) m,
            (VALUES ('_variance_sum', 'Sum of v x, x being %'), ('_variance_squares', 'Sum of v x^2, x being %'))
                s (suffix, comment)
        LOOP
            EXECUTE format('ALTER TABLE decuwatch.%I ADD COLUMN %I double precision NOT NULL DEFAULT 0 '
                'CHECK (%2$I < ''Infinity'')', parts, c.name);
            EXECUTE format('COMMENT ON COLUMN decuwatch.%I.%I IS %L', parts, c.name, c.comment);
        END LOOP;
        FOR c IN SELECT unnest(ARRAY['class_gap', 'request_risk', 'image_risk']) AS name LOOP
            EXECUTE format('COMMENT ON COLUMN decuwatch.%I.%I IS %L', parts, c.name || '_sum',
                format('Sum of x / p, x being %s and p the probability with which it was to be measured', c.name));
            EXECUTE format('COMMENT ON COLUMN decuwatch.%I.%I IS %L', parts, c.name || '_squares',
                format('Sum of x^2 / p, x being %s and p the probability with which it was to be measured', c.name));
        END LOOP;
    END LOOP;
END $$;
-- +goose StatementEnd

-- The views show the new columns after the others.
CREATE OR REPLACE VIEW decuwatch.production_scores AS
SELECT s.* FROM decuwatch.scores s
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model
);

-- +goose StatementBegin
DO $$
BEGIN
    EXECUTE 'CREATE OR REPLACE VIEW decuwatch_views.scores AS ' || regexp_replace(
        pg_get_viewdef('decuwatch_views.scores'), '\s+FROM\s', ', inclusion_probability FROM ');
END $$;
-- +goose StatementEnd
CREATE OR REPLACE VIEW decuwatch_views.production_scores AS
SELECT s.* FROM decuwatch_views.scores s
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model
);
CREATE OR REPLACE VIEW decuwatch_views.skips AS
SELECT source, event_id, event_time, model, class, reason, detail, labels, recorded_at, inclusion_probability
FROM decuwatch.skips;

CREATE OR REPLACE VIEW decuwatch.production_measurements AS
SELECT s.model, s.ensemble_digest, s.settings, s.class_index, s.event_time, s.source, s.event_id,
    m.measurement, m.value, m.mean_distance, m.saturated, 1 / (s.inclusion_probability * m.probability) AS weight
FROM decuwatch.production_scores s,
LATERAL (VALUES
    ('class_gap', s.class_gap::double precision, s.class_gap_mean_distance::double precision, s.class_gap_saturated, 1),
    ('request_risk', s.request_risk, s.request_risk_mean_distance, s.request_risk_saturated, s.request_risk_probability),
    ('image_risk', s.image_risk, 0, false, 1)
) m (measurement, value, mean_distance, saturated, probability)
WHERE m.value IS NOT NULL;
COMMENT ON COLUMN decuwatch.production_measurements.weight IS
    'How many requests of the traffic the measurement stands for: 1 / the probability with which it was to be made';

-- One view over both rollups would not use their indexes, so the same text is executed for each. A standard error is of
-- sampling alone: it is 0 if every request was scored, and NULL if a single score stands for several requests.
-- +goose StatementBegin
DO $$
DECLARE
    span record;
    m    record;
    sums text := '';
    spread text[] := '{}'; -- mean and deviation of each measurement
    errors text := '';
BEGIN
    FOR m IN SELECT * FROM (VALUES ('class_gap', 'n'), ('request_risk', 'request_risk_n'), ('image_risk', 'image_risk_n')) t (x, n) LOOP
        sums := sums || format('
            %2$s + sum(%1$s_extra) AS %1$s_weight,
            sum(%1$s_sum) AS %1$s_sum, sum(%1$s_squares) AS %1$s_squares, sum(%1$s_variance) AS %1$s_variance,
            sum(%1$s_variance_sum) AS %1$s_variance_sum, sum(%1$s_variance_squares) AS %1$s_variance_squares,
            min(%1$s_min)::double precision AS %1$s_min, max(%1$s_max)::double precision AS %1$s_max,', m.x,
            CASE m.x WHEN 'class_gap' THEN 'sum(n)::double precision' WHEN 'request_risk' THEN 'sum(n - request_risk_unmeasured)'
                ELSE 'sum(image_risk_n)::double precision' END);
        spread := spread || format('
            CASE WHEN %2$I > 0 THEN %1$s_sum / %1$s_weight END AS %1$s_mean,
            CASE WHEN %2$I > 1 THEN sqrt(greatest(0,
                (%1$s_squares - %1$s_sum ^ 2 / %1$s_weight) / %1$s_weight * (%2$I / (%2$I - 1)))) END AS %1$s_sd,
            %1$s_min, %1$s_max', m.x, m.n);
        errors := errors || format(',
            CASE WHEN %2$I > 1 OR %2$I = 1 AND %1$s_variance = 0 THEN sqrt(greatest(0, %1$s_variance_squares
                - 2 * %1$s_sum / %1$s_weight * %1$s_variance_sum + (%1$s_sum / %1$s_weight) ^ 2 * %1$s_variance))
                / %1$s_weight END AS %1$s_mean_se', m.x, m.n);
    END LOOP;
    FOR span IN SELECT * FROM (VALUES
        ('hour', 'class_hour_parts', 'class_risk_hourly'), ('day', 'class_day_parts', 'class_risk_daily')
    ) t (name, parts, view) LOOP
        EXECUTE format('
            CREATE OR REPLACE VIEW decuwatch_views.%3$I AS
            SELECT %1$I, model, ensemble_digest, settings, class_index, class_label, n::bigint,
                %4$s, class_gap_saturated, %5$s, request_risk_saturated, warnings, criticals, image_risk_n::bigint, %6$s, request_risk_n::bigint,
                n + extra AS requests, sqrt(variance) AS requests_se,
                warnings + warnings_extra AS warnings_estimated, sqrt(warnings_variance) AS warnings_se,
                criticals + criticals_extra AS criticals_estimated, sqrt(criticals_variance) AS criticals_se,
                request_risk_weight AS request_risk_requests, image_risk_weight AS image_risk_requests %7$s
            FROM (
                SELECT %1$I, model, ensemble_digest, settings, class_index, class_label,
                    sum(n)::double precision AS n, sum(image_risk_n)::double precision AS image_risk_n,
                    sum(n - request_risk_unmeasured)::double precision AS request_risk_n, %8$s
                    sum(class_gap_saturated)::bigint AS class_gap_saturated,
                    sum(request_risk_saturated)::bigint AS request_risk_saturated,
                    sum(warnings)::bigint AS warnings, sum(criticals)::bigint AS criticals,
                    sum(extra) AS extra, sum(variance) AS variance,
                    sum(warnings_extra) AS warnings_extra, sum(warnings_variance) AS warnings_variance,
                    sum(criticals_extra) AS criticals_extra, sum(criticals_variance) AS criticals_variance
                FROM decuwatch.%2$I
                GROUP BY %1$I, model, ensemble_digest, settings, class_index, class_label
            ) sums', span.name, span.parts, span.view, spread[1], spread[2], spread[3], errors, sums);
        FOR m IN SELECT * FROM (VALUES
            ('n', 'Scores: a count, whatever they stand for'),
            ('warnings', 'Scores with a warning: a count, whatever they stand for'),
            ('criticals', 'Scores with a critical alert: a count, whatever they stand for'),
            ('requests', 'Estimated requests for which the scores stand: sum of 1 / inclusion probability. Equal to n without sampling'),
            ('requests_se', 'Standard error of requests'),
            ('request_risk_requests', 'Estimated requests for which the scores with a request_risk stand'),
            ('image_risk_requests', 'Estimated requests for which the scores with an image_risk stand'),
            ('warnings_estimated', 'Estimated requests with a warning, had every request been scored'),
            ('warnings_se', 'Standard error of warnings_estimated'),
            ('criticals_estimated', 'Estimated requests with a critical alert, had every request been scored'),
            ('criticals_se', 'Standard error of criticals_estimated'),
            ('class_gap_mean', 'Estimated mean of class_gap over requests'),
            ('class_gap_sd', 'Estimated standard deviation of class_gap over requests; NULL for one score'),
            ('class_gap_mean_se', 'Standard error of class_gap_mean by sampling: 0 if every request was scored, NULL if it is unknown'),
            ('request_risk_mean', 'Estimated mean of request_risk over requests; NULL if it was not measured'),
            ('request_risk_sd', 'Estimated standard deviation of request_risk over requests; NULL for one score'),
            ('request_risk_mean_se', 'Standard error of request_risk_mean by sampling: 0 if every request was scored, NULL if it is unknown'),
            ('image_risk_mean', 'Estimated mean of image_risk over requests that have it; NULL if it was not measured'),
            ('image_risk_sd', 'Estimated standard deviation of image_risk over requests; NULL for one score'),
            ('image_risk_mean_se', 'Standard error of image_risk_mean by sampling: 0 if every request was scored, NULL if it is unknown')
        ) t (x, comment) LOOP
            EXECUTE format('COMMENT ON COLUMN decuwatch_views.%I.%I IS %L', span.view, m.x, m.comment);
        END LOOP;
    END LOOP;
END $$;
-- +goose StatementEnd

-- A column of a view or a partition means what the column of the table means that it comes from.
-- +goose StatementBegin
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN
        SELECT v.oid::regclass AS view, va.attname AS column, pg_catalog.col_description(t.oid, ta.attnum) AS comment
        FROM (
            VALUES ('decuwatch_views.scores', 'decuwatch.scores'), ('decuwatch_views.production_scores', 'decuwatch.scores'),
            ('decuwatch.production_scores', 'decuwatch.scores'), ('decuwatch_views.skips', 'decuwatch.skips')
            UNION ALL
            SELECT inhrelid::regclass::text, 'decuwatch.scores' FROM pg_catalog.pg_inherits
            WHERE inhparent = 'decuwatch.scores'::regclass
        ) x (view, source)
        JOIN pg_catalog.pg_class v ON v.oid = x.view::regclass
        JOIN pg_catalog.pg_class t ON t.oid = x.source::regclass
        JOIN pg_catalog.pg_attribute va ON va.attrelid = v.oid AND va.attnum > 0
        JOIN pg_catalog.pg_attribute ta ON ta.attrelid = t.oid AND ta.attname = va.attname
        WHERE pg_catalog.col_description(v.oid, va.attnum) IS NULL OR (x.source, va.attname) = ('decuwatch.skips', 'reason')
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', c.view, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd

-- +goose Down
-- Columns of older tables and views go with these: migrations are only taken back all together.
SELECT 1;

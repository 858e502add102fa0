-- +goose Up
-- A cascade leaves out the request risk of scores whose class gap is low.
ALTER TABLE decuwatch.scores
    ALTER COLUMN request_risk DROP NOT NULL,
    ALTER COLUMN request_risk_estimator DROP NOT NULL,
    ALTER COLUMN request_risk_upper_bound DROP NOT NULL,
    ALTER COLUMN request_risk_saturated DROP NOT NULL,
    ALTER COLUMN request_risk_mean_distance DROP NOT NULL,
    ALTER COLUMN request_risk_distances DROP NOT NULL,
    ALTER COLUMN request_risk_shares DROP NOT NULL,
    ALTER COLUMN request_risk_branch_step DROP NOT NULL,
    ALTER COLUMN request_risk_rollout_steps DROP NOT NULL,
    ADD COLUMN request_risk_reason text,
    ADD COLUMN request_risk_probability double precision NOT NULL DEFAULT 1,
    ADD CONSTRAINT scores_request_risk CHECK (
        (request_risk IS NULL) = (request_risk_reason IS NOT NULL)
        AND (request_risk IS NULL) = (request_risk_estimator IS NULL)
        AND request_risk_reason IN ('below_cut')
        AND request_risk_probability BETWEEN 0 AND 1
        AND (request_risk IS NULL OR request_risk_probability > 0)
    ) NOT VALID;
COMMENT ON COLUMN decuwatch.scores.request_risk IS
    'How risky the request is within its class: the estimate at the request measurement''s branch, in nats for the paide estimators, in squared latent units for mean-w2. NULL if it was not measured: request_risk_reason says why';
COMMENT ON COLUMN decuwatch.scores.request_risk_reason IS
    'Why request_risk is NULL: below_cut (class_gap is below the cut of the cascade). NULL if it was measured';
COMMENT ON COLUMN decuwatch.scores.request_risk_probability IS
    'Probability with which request_risk was to be measured, given class_gap: 1 without a cascade, and above its cut';

ALTER TABLE decuwatch.alerts ALTER COLUMN request_risk DROP NOT NULL;
COMMENT ON COLUMN decuwatch.alerts.request_risk IS 'Request risk of the score; NULL if it was not measured';

-- What is counted is what a score lacks, so that rows of older workers are right.
ALTER TABLE decuwatch.class_hour_parts
    ALTER COLUMN request_risk_min DROP NOT NULL,
    ALTER COLUMN request_risk_max DROP NOT NULL,
    ADD COLUMN request_risk_unmeasured bigint NOT NULL DEFAULT 0 CHECK (request_risk_unmeasured >= 0);
ALTER TABLE decuwatch.class_day_parts
    ALTER COLUMN request_risk_min DROP NOT NULL,
    ALTER COLUMN request_risk_max DROP NOT NULL,
    ADD COLUMN request_risk_unmeasured bigint NOT NULL DEFAULT 0 CHECK (request_risk_unmeasured >= 0);
COMMENT ON COLUMN decuwatch.class_hour_parts.request_risk_unmeasured IS 'Scores whose request_risk was not measured';
COMMENT ON COLUMN decuwatch.class_day_parts.request_risk_unmeasured IS 'Scores whose request_risk was not measured';
COMMENT ON COLUMN decuwatch.class_hour_parts.request_risk_min IS 'Least request_risk; NULL if it was not measured';
COMMENT ON COLUMN decuwatch.class_day_parts.request_risk_min IS 'Least request_risk; NULL if it was not measured';
COMMENT ON COLUMN decuwatch.class_hour_parts.request_risk_max IS 'Greatest request_risk; NULL if it was not measured';
COMMENT ON COLUMN decuwatch.class_day_parts.request_risk_max IS 'Greatest request_risk; NULL if it was not measured';

-- The views show the new columns after the others.
CREATE OR REPLACE VIEW decuwatch.production_scores AS
SELECT s.* FROM decuwatch.scores s
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model
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
    request_risk_steps, image_risk_tables, image_risk_guidance, image_risk_steps, class_images, class_n_eff, class_draws,
    first_latent, request_risk_reason, request_risk_probability
FROM decuwatch.scores;
CREATE OR REPLACE VIEW decuwatch_views.production_scores AS
SELECT s.* FROM decuwatch_views.scores s
WHERE NOT EXISTS (
    SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model
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
                CASE WHEN request_risk_n > 0 THEN request_risk_sum / request_risk_n END AS request_risk_mean,
                CASE WHEN request_risk_n > 1 THEN sqrt(greatest(0,
                    (request_risk_squares - request_risk_sum ^ 2 / request_risk_n) / (request_risk_n - 1))) END
                    AS request_risk_sd,
                request_risk_min, request_risk_max, request_risk_saturated,
                warnings, criticals,
                image_risk_n::bigint,
                CASE WHEN image_risk_n > 0 THEN image_risk_sum / image_risk_n END AS image_risk_mean,
                CASE WHEN image_risk_n > 1 THEN sqrt(greatest(0,
                    (image_risk_squares - image_risk_sum ^ 2 / image_risk_n) / (image_risk_n - 1))) END
                    AS image_risk_sd,
                image_risk_min, image_risk_max, request_risk_n::bigint
            FROM (
                SELECT %1$I, model, ensemble_digest, settings, class_index, class_label,
                    sum(n)::double precision AS n,
                    sum(class_gap_sum) AS class_gap_sum, sum(class_gap_squares) AS class_gap_squares,
                    min(class_gap_min)::double precision AS class_gap_min,
                    max(class_gap_max)::double precision AS class_gap_max,
                    sum(class_gap_saturated)::bigint AS class_gap_saturated,
                    sum(n - request_risk_unmeasured)::double precision AS request_risk_n,
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
        EXECUTE format('COMMENT ON COLUMN decuwatch_views.%I.request_risk_mean IS %L', span.view,
            'Mean of request_risk, over the scores that have it; NULL if it was not measured');
        EXECUTE format('COMMENT ON COLUMN decuwatch_views.%I.request_risk_n IS %L', span.view,
            'Scores whose request_risk was measured');
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
            VALUES ('decuwatch_views.scores', 'decuwatch.scores'), ('decuwatch_views.alerts', 'decuwatch.alerts'),
            ('decuwatch_views.production_scores', 'decuwatch.scores'),
            ('decuwatch_views.production_alerts', 'decuwatch.alerts'),
            ('decuwatch.production_scores', 'decuwatch.scores'), ('decuwatch.production_alerts', 'decuwatch.alerts'),
            ('decuwatch_views.class_risk_hourly', 'decuwatch.class_hour_parts'),
            ('decuwatch_views.class_risk_daily', 'decuwatch.class_day_parts')
            UNION ALL
            SELECT inhrelid::regclass::text, 'decuwatch.scores' FROM pg_catalog.pg_inherits
            WHERE inhparent = 'decuwatch.scores'::regclass
        ) x (view, source)
        JOIN pg_catalog.pg_class v ON v.oid = x.view::regclass
        JOIN pg_catalog.pg_class t ON t.oid = x.source::regclass
        JOIN pg_catalog.pg_attribute va ON va.attrelid = v.oid AND va.attnum > 0
        JOIN pg_catalog.pg_attribute ta ON ta.attrelid = t.oid AND ta.attname = va.attname
        WHERE va.attname LIKE 'request\_risk%' OR va.attname = 'first_latent'
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', c.view, c.column, c.comment);
    END LOOP;
END $$;
-- +goose StatementEnd

-- +goose Down
-- Columns of older tables and views go with these: migrations are only taken back all together.
SELECT 1;

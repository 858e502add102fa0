-- +goose Up
-- A third reason why a score has no image risk: the decoder or the judge gave a NaN or an infinity for this image alone.
ALTER TABLE decuwatch.scores
    DROP CONSTRAINT scores_image_risk,
    ADD CONSTRAINT scores_image_risk CHECK (
        image_risk BETWEEN 0 AND 1
        AND (image_risk IS NULL OR image_risk_reason IS NULL)
        AND (image_risk IS NULL) = (image_risk_estimator IS NULL)
        AND image_risk_reason IN ('no_judge', 'judge_cannot_tell', 'not_finite')
        AND image_risk_upper_bound < 'Infinity'
        AND jsonb_typeof(image_risk_top) = 'array'
    ) NOT VALID;
-- +goose StatementBegin
DO $$
DECLARE
    name text;
BEGIN
    FOR name IN
        SELECT v.oid::regclass::text
        FROM pg_catalog.pg_class v
        JOIN pg_catalog.pg_attribute a ON a.attrelid = v.oid AND a.attname = 'image_risk_reason'
        WHERE v.relnamespace IN ('decuwatch'::regnamespace, 'decuwatch_views'::regnamespace)
            AND v.relkind IN ('r', 'p', 'v')
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.image_risk_reason IS %L', name,
            'Why image_risk is NULL: no_judge, judge_cannot_tell (the judge is too often wrong about the class) or '
            'not_finite (the image, or what the judge said of it, was not a number). NULL if it was measured, and in '
            'rows that are older than the column');
    END LOOP;
END $$;
-- +goose StatementEnd

-- +goose Down
-- The column goes with its table: migrations are only taken back all together.
SELECT 1;

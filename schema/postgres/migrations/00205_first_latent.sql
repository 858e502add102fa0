-- +goose Up
-- How the first latent of a rerun was drawn, beside seed and generator. Older rows are draws of the usual kind: NULL.
ALTER TABLE decuwatch.scores
    ADD COLUMN first_latent jsonb,
    ADD CONSTRAINT scores_first_latent CHECK (jsonb_typeof(first_latent) = 'object') NOT VALID;
COMMENT ON COLUMN decuwatch.scores.first_latent IS
    'How the generator drew the first latent of the rerun (number type, offset, GPU, batch), or the SHA-256 and step of the event''s own latent. NULL for a draw of float32 for one image, by a generator that was just seeded';
COMMENT ON COLUMN decuwatch.scores.requested IS 'What the event asked for: class as it was named; noise, latent and sampler if given';

-- +goose Down
-- Columns of older tables go with these: migrations are only taken back all together.
SELECT 1;

INSERT INTO decuwatch.shadow_positions (model, ensemble_digest) VALUES ($1, $2) ON CONFLICT DO NOTHING

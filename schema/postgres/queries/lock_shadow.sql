SELECT position, clock_timestamp() - $3::interval FROM decuwatch.shadow_positions
WHERE model = $1 AND ensemble_digest = $2 FOR UPDATE SKIP LOCKED

UPDATE decuwatch.shadow_positions SET position = $3 WHERE model = $1 AND ensemble_digest = $2

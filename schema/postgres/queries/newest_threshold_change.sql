SELECT coalesce(max(change_id), 0) FROM decuwatch.thresholds WHERE model = $1 AND measurement = $2 AND scope <> 'limit'

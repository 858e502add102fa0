SELECT id, kind, coalesce(undoes, 0), set_by, reason, set_at FROM decuwatch.threshold_changes c
WHERE $1 = '' OR EXISTS (SELECT FROM decuwatch.thresholds t WHERE t.change_id = c.id AND t.model = $1)
ORDER BY id DESC LIMIT $2

SELECT id FROM decuwatch.threshold_changes c
WHERE kind <> 'rollback' AND NOT EXISTS (SELECT FROM decuwatch.threshold_changes r WHERE r.undoes = c.id)
ORDER BY id DESC LIMIT 1

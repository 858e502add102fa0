SELECT row_to_json(t) FROM decuwatch.thresholds t WHERE change_id = $1 ORDER BY id

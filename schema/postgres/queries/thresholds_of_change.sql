SELECT row_to_json(t) FROM (
    SELECT *, class_index AS class FROM decuwatch.thresholds WHERE change_id = $1
) t ORDER BY id

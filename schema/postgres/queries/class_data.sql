SELECT row_to_json(c) FROM decuwatch.class_data c
WHERE model = $1 AND ensemble_digest = $2 AND class_index = ANY ($3)

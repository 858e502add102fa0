SELECT row_to_json(r) FROM decuwatch.review_list r WHERE id = $1

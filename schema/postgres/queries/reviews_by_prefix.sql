SELECT row_to_json(r) FROM decuwatch.review_list r WHERE starts_with(id, $1) LIMIT 2

SELECT row_to_json(a) FROM decuwatch.alerts a WHERE id = $1

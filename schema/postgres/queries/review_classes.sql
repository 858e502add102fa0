SELECT DISTINCT model, class_index, class_label FROM decuwatch.reviews
ORDER BY model, class_label, class_index LIMIT 500

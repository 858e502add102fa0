SELECT DISTINCT model, class_index, class_label FROM (
    SELECT model, class_index, class_label FROM decuwatch.class_day_parts
    UNION ALL SELECT model, class_index, class_label FROM decuwatch.class_hour_parts
) c
WHERE ($1 = '' OR model = $1) AND (class_index = $3 OR $2 <> '' AND lower(class_label) = lower($2))

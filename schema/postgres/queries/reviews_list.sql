SELECT row_to_json(r) FROM decuwatch.review_list r
WHERE (cardinality($1::text[]) = 0 OR state = ANY ($1)) AND ($2 = '' OR model = $2)
    AND ($3::integer IS NULL OR class_index = $3) AND ($4 = '' OR assignee = $4) AND ($5 = '' OR severity = $5)
    AND ($6::timestamptz IS NULL OR (opened_at, id) < ($6, $7))
ORDER BY opened_at DESC, id DESC LIMIT $8

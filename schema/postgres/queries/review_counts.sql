SELECT state, count(*) FROM decuwatch.review_list
WHERE (cardinality($1::text[]) = 0 OR state = ANY ($1)) AND ($2 = '' OR model = $2)
    AND ($3::integer IS NULL OR class_index = $3) AND ($4 = '' OR assignee = $4) AND ($5 = '' OR severity = $5)
GROUP BY state

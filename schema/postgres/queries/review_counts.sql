SELECT state, count(*) FROM decuwatch.review_list
WHERE (cardinality($1::text[]) = 0 OR state = ANY ($1)) AND ($2 = '' OR model = $2)
    AND ($3::integer IS NULL OR class_index = $3) AND ($4 = '' OR assignee = $4) AND ($5 = '' OR severity = $5)
    AND ($6 = '' OR class_label = $6)
    AND ($7 = '' OR strpos(lower(event_id), lower($7)) > 0 OR starts_with(id, lower($7)) OR EXISTS (
        SELECT FROM jsonb_each_text(labels) t
        WHERE strpos(lower(t.value), lower($7)) > 0 OR lower(t.key || '=' || t.value) = lower($7)))
GROUP BY state

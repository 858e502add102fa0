SELECT place::text, row_to_json(r)
FROM (SELECT l.*, CASE $8 WHEN 'newest' THEN -extract(epoch FROM opened_at)
        WHEN 'oldest' THEN extract(epoch FROM opened_at)
        ELSE -coalesce((measured ->> $8)::numeric, 0) END AS place FROM decuwatch.review_list l) r
WHERE (cardinality($1::text[]) = 0 OR state = ANY ($1)) AND ($2 = '' OR model = $2)
    AND ($3::integer IS NULL OR class_index = $3) AND ($4 = '' OR assignee = $4) AND ($5 = '' OR severity = $5)
    AND ($6 = '' OR class_label = $6)
    AND ($7 = '' OR strpos(lower(event_id), lower($7)) > 0 OR starts_with(id, lower($7)) OR EXISTS (
        SELECT FROM jsonb_each_text(labels) t
        WHERE strpos(lower(t.value), lower($7)) > 0 OR lower(t.key || '=' || t.value) = lower($7)))
    AND ($9::text IS NULL OR (place, id) > ($9::numeric, $10))
    AND ($11::text IS NULL OR (place, id) < ($11::numeric, $12))
ORDER BY CASE WHEN $11 IS NOT NULL THEN -place ELSE place END, CASE WHEN $11 IS NOT NULL THEN id END DESC, id LIMIT $13

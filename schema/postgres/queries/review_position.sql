WITH placed AS MATERIALIZED (
    SELECT *, CASE $8 WHEN 'newest' THEN -extract(epoch FROM opened_at) WHEN 'oldest' THEN extract(epoch FROM opened_at)
        ELSE -coalesce((measured ->> $8)::numeric, 0) END AS place FROM decuwatch.review_list
), filtered AS (
    SELECT place, id FROM placed
    WHERE (cardinality($1::text[]) = 0 OR state = ANY ($1)) AND ($2 = '' OR model = $2)
        AND ($3::integer IS NULL OR class_index = $3) AND ($4 = '' OR assignee = $4) AND ($5 = '' OR severity = $5)
        AND ($6 = '' OR class_label = $6)
        AND ($7 = '' OR strpos(lower(event_id), lower($7)) > 0 OR starts_with(id, lower($7)) OR EXISTS (
            SELECT FROM jsonb_each_text(labels) t
            WHERE strpos(lower(t.value), lower($7)) > 0 OR lower(t.key || '=' || t.value) = lower($7)))
), this AS (SELECT place, id FROM placed WHERE id = $9)
SELECT this.place::text, EXISTS (SELECT FROM filtered f WHERE f.id = this.id),
    (SELECT count(*) FROM filtered f WHERE (f.place, f.id) < (this.place, this.id)),
    (SELECT count(*) FROM filtered f WHERE (f.place, f.id) > (this.place, this.id)),
    coalesce((SELECT f.id FROM filtered f WHERE (f.place, f.id) < (this.place, this.id)
        ORDER BY f.place DESC, f.id DESC LIMIT 1), ''),
    coalesce((SELECT f.id FROM filtered f WHERE (f.place, f.id) > (this.place, this.id)
        ORDER BY f.place, f.id LIMIT 1), '')
FROM this

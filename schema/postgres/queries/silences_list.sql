SELECT row_to_json(s) FROM decuwatch_views.silences s
WHERE ($1 = '' OR model = $1) AND ($2 OR now() < coalesce(ended_at, ends_at)) ORDER BY id DESC LIMIT $3

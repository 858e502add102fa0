SELECT row_to_json(a) FROM decuwatch.alerts a
WHERE ($1 = '' OR model = $1) AND ($2 = '' OR severity = $2) AND ($3::integer IS NULL OR class_index = $3)
    AND ($4 = '' OR kind = $4) AND kind <> $5 AND recorded_at >= $6
ORDER BY recorded_at DESC, id LIMIT $7

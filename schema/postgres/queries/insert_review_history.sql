INSERT INTO decuwatch.review_history (review_id, version, action, actor, state, verdict, assignee, comment, at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)

SELECT version, action, actor, state, coalesce(verdict, ''), assignee, comment, at
FROM decuwatch.review_history WHERE review_id = $1 ORDER BY version

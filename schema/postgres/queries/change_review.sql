UPDATE decuwatch.reviews SET state = $3, verdict = $4, assignee = $5, version = version + 1, updated_at = $6,
    resolved_at = $7
WHERE id = $1 AND version = $2 RETURNING version

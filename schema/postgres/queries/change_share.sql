INSERT INTO decuwatch.shares (model, share, reason)
SELECT $1, $3, $4
WHERE $2 = coalesce((SELECT share FROM decuwatch.shares WHERE model = $1 ORDER BY at DESC LIMIT 1), 1)

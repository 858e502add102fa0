SELECT least(
    coalesce((SELECT min(share) FROM decuwatch.shares WHERE model = $1 AND at > $2), 1),
    coalesce((SELECT share FROM decuwatch.shares WHERE model = $1 AND at <= $2 ORDER BY at DESC LIMIT 1), 1))

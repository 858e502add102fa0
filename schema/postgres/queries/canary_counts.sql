SELECT coalesce(outcome, 'open'), count(*) FROM decuwatch.canaries
WHERE ($1 = '' OR model = $1) AND published_at >= $2 GROUP BY 1

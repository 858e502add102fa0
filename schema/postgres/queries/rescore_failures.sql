SELECT kind, count(DISTINCT (source, event_id)), min(reason) FROM decuwatch.rescore_failures WHERE run = $1
GROUP BY kind ORDER BY 2 DESC, 1

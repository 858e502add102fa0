SELECT sink, count(*), greatest(clock_timestamp() - min(created_at), interval '0')
FROM decuwatch.outbox WHERE delivered_at IS NULL GROUP BY sink ORDER BY sink

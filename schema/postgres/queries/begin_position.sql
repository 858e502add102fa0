INSERT INTO decuwatch.stream_positions (stream, created, begun_at, position) VALUES ($1, $2, $3, $3)
ON CONFLICT DO NOTHING

SELECT position FROM decuwatch.stream_positions WHERE stream = $1 AND created = $2

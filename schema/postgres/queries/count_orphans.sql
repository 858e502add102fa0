SELECT count(*) FROM decuwatch.dead_letters WHERE stream = $1 AND sequence > $2 AND subject = $3

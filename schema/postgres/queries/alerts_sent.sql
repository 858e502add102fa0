SELECT id, delivery = $1 FROM decuwatch.alerts WHERE recorded_at >= $2

UPDATE decuwatch.redeliveries SET published_as = $2 WHERE id = $1

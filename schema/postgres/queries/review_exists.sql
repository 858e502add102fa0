SELECT EXISTS (SELECT FROM decuwatch.reviews WHERE id = $1)

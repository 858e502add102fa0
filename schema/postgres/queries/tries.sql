SELECT failed, handed_back, watched, alone FROM decuwatch.tries
WHERE stream = $1 AND sequence = $2 AND digest = $3

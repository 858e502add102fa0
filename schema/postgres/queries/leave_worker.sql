UPDATE decuwatch.workers SET seen_at = '-infinity' WHERE id = $1

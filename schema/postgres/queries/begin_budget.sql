INSERT INTO decuwatch.budgets (model) VALUES ($1) ON CONFLICT DO NOTHING

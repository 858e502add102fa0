INSERT INTO decuwatch.outcome_hour_parts (hour, model, outcome, reason, n)
SELECT coalesce(hour, date_trunc('hour', now(), 'UTC')), model, outcome, reason, n
FROM json_populate_recordset(NULL::decuwatch.outcome_hour_parts, $1)

SELECT m FROM (
    SELECT date_trunc('month', now(), 'UTC') + make_interval(months => i) AS m FROM generate_series(0, $1::integer) i
) months, decuwatch.ensure_partition(m)

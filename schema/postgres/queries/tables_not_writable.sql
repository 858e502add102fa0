SELECT coalesce(array_agg(t ORDER BY t), '{}') FROM unnest($1::text[]) t
WHERE NOT coalesce(has_table_privilege(to_regclass('decuwatch.' || t), 'INSERT'), false)

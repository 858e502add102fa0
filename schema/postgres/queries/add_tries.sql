INSERT INTO decuwatch.tries AS t (stream, sequence, digest, failed, handed_back, watched, alone)
VALUES ($1, $2, $3,
    greatest(0, $4::integer), greatest(0, $5::integer), greatest(0, $6::integer), greatest(0, $7::integer))
ON CONFLICT (stream, sequence, digest) DO UPDATE SET
    failed = greatest(0, t.failed + $4), handed_back = greatest(0, t.handed_back + $5),
    watched = greatest(0, t.watched + $6), alone = greatest(0, t.alone + $7), tried_at = clock_timestamp()
RETURNING failed, handed_back, watched, alone

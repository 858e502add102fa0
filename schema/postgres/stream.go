package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// Settled returns the messages from <= sequence <= to of a stream that have a verdict, or repeat an event that has one,
// in order of sequence.
func (s *Store) Settled(ctx context.Context, stream string, from, to uint64) ([]schema.Settled, error) {
	messages, err := list(ctx, s.pool, pgx.RowToStructByPos[schema.Settled], settled, stream, int64(from), int64(to))
	if err != nil {
		return nil, fmt.Errorf("read settled messages of stream %s: %w", stream, err)
	}
	return messages, nil
}

// Position returns the sequence number up to which the stream that was made at the given moment has been swept. A
// stream that is not known yet is begun after the message at.
func (s *Store) Position(ctx context.Context, stream string, created time.Time, at uint64) (uint64, error) {
	_, err := s.pool.Exec(ctx, beginPosition, stream, created, int64(at))
	if err != nil {
		return 0, fmt.Errorf("begin the position of stream %s: %w", stream, err)
	}
	position, _, err := s.SweptTo(ctx, stream, created)
	return position, err
}

// SweptTo is Position of a stream that may not have been begun; then it returns false.
func (s *Store) SweptTo(ctx context.Context, stream string, created time.Time) (uint64, bool, error) {
	var position int64
	err := s.pool.QueryRow(ctx, sweptPosition, stream, created).Scan(&position)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("read the position of stream %s: %w", stream, err)
	}
	return uint64(position), true, nil
}

// accountedFor is how long a message that left the stream is compared with the ledger: the shortest retention that is
// allowed, so that its row cannot have been removed.
const accountedFor = 30 * 24 * time.Hour

// AccountedFrom returns the first sequence number of a stream from which every message has a row in the ledger as soon
// as it has its verdict, and false if no worker has seen the stream yet.
func (s *Store) AccountedFrom(ctx context.Context, stream string, created time.Time) (uint64, bool, error) {
	var from int64
	err := s.pool.QueryRow(ctx, accountedFrom, stream, created, accountedFor).Scan(&from)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("read the position of stream %s: %w", stream, err)
	}
	return uint64(from), true, nil
}

// Unsettled returns the ranges of messages from <= sequence <= to of the stream that was made at the given moment that
// have no verdict: first and last of each, in order.
func (s *Store) Unsettled(ctx context.Context, stream string, created time.Time, from, to uint64) ([][2]uint64, error) {
	if from > to {
		return nil, nil
	}
	// The clocks of server and database differ by less than a minute.
	ranges, err := list(ctx, s.pool, func(row pgx.CollectableRow) (r [2]uint64, err error) {
		err = row.Scan(&r[0], &r[1])
		return r, err
	}, unsettled, stream, int64(from), int64(to), created.Add(-time.Minute))
	if err != nil {
		return nil, fmt.Errorf("read messages without a verdict of stream %s: %w", stream, err)
	}
	return ranges, nil
}

// Advance moves the position of a stream, and reports false if it is not at from any more.
func (s *Store) Advance(ctx context.Context, stream string, created time.Time, from, to uint64) (bool, error) {
	tag, err := s.pool.Exec(ctx, advancePosition, stream, created, int64(from), int64(to))
	if err != nil {
		return false, fmt.Errorf("move the position of stream %s: %w", stream, err)
	}
	return tag.RowsAffected() == 1, nil
}

// SettledBefore returns the highest sequence from first to last up to which no verdict is younger than age, or first-1.
func (s *Store) SettledBefore(
	ctx context.Context, stream string, first, last uint64, age time.Duration,
) (uint64, error) {
	var young *int64
	err := s.pool.QueryRow(ctx, settledBefore, stream, int64(first), int64(last), age).Scan(&young)
	if err != nil {
		return 0, fmt.Errorf("read the age of verdicts of stream %s: %w", stream, err)
	}
	if young == nil {
		return last, nil
	}
	return uint64(*young) - 1, nil
}

// Orphans returns how many messages of a subject above a sequence are dead letters.
func (s *Store) Orphans(ctx context.Context, stream, subject string, above uint64) (int, error) {
	var n int
	err := s.pool.QueryRow(ctx, countOrphans, stream, int64(above), subject).Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("count dead letters of %s: %w", subject, err)
	}
	return n, nil
}

// EventDigests returns the digest of each event that has its verdict; other events are left out.
func (s *Store) EventDigests(ctx context.Context, events []schema.Identity) (map[schema.Identity]string, error) {
	sources, ids, models := make([]string, len(events)), make([]string, len(events)), make([]string, len(events))
	for i, e := range events {
		sources[i], ids[i], models[i] = e.Source, e.ID, e.Model
	}
	rows, err := s.pool.Query(ctx, eventDigests, sources, ids, models)
	if err != nil {
		return nil, fmt.Errorf("look up %d events: %w", len(events), err)
	}
	digests := make(map[schema.Identity]string, len(events))
	var key schema.Identity
	var digest string
	if _, err := pgx.ForEachRow(rows, []any{&key.Source, &key.ID, &key.Model, &digest},
		func() error { digests[key] = digest; return nil }); err != nil {
		return nil, fmt.Errorf("look up %d events: %w", len(events), err)
	}
	return digests, nil
}

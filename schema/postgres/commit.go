package postgres

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// commitLoop takes what waits, up to a batch, into one transaction after the other: while one commits the next
// batch gathers.
func (s *Store) commitLoop() {
	for {
		var batch []*call
		select {
		case c := <-s.queue:
			batch = append(batch, c)
		case <-s.closing:
			return
		}
		for full := false; !full && len(batch) < s.config.BatchSize; {
			select {
			case c := <-s.queue:
				batch = append(batch, c)
			default:
				full = true
			}
		}
		s.commit(batch)
	}
}

// commit commits calls and answers each.
func (s *Store) commit(calls []*call) {
	for len(calls) > 0 {
		// The second of two calls on one event waits for the next round, where it finds the first one's verdict.
		round, later, seen := calls[:0:0], []*call(nil), map[string]bool{}
		for _, c := range calls {
			if key := c.key(); seen[key] {
				later = append(later, c)
			} else {
				seen[key] = true
				round = append(round, c)
			}
		}
		slices.SortFunc(round, func(a, b *call) int { return cmp.Compare(a.key(), b.key()) })
		s.commitRound(round)
		for _, c := range round {
			close(c.done)
		}
		calls = later
	}
}

// commitRound commits calls together; if the database refuses the contents of one, it commits each by itself, so that
// one bad verdict does not fail its neighbours.
func (s *Store) commitRound(round []*call) {
	const tries = 3
	var err error
	for range tries {
		if err = s.transact(round); err == nil {
			return
		}
		if missingPartition(err) { // retention dropped the partition of an old event
			if e := s.ensureMonths(round); e != nil {
				err = e
				break
			}
			continue
		}
		if !collided(err) {
			break
		}
	}
	if len(round) > 1 && (Refused(err) || ofOneRow(err)) {
		for _, c := range round {
			s.commitRound([]*call{c})
		}
		return
	}
	for _, c := range round {
		c.won, c.stands, c.err = false, nil, err
	}
}

// ensureMonths creates the partitions of calls, whatever was known of them.
func (s *Store) ensureMonths(round []*call) error {
	s.months.Clear()
	for _, c := range round {
		if c.score == nil {
			continue
		}
		if err := s.ensureMonth(context.Background(), c.score.EventTime); err != nil {
			return err
		}
	}
	return nil
}

// transact writes what the ledger has no verdict on yet.
func (s *Store) transact(round []*call) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), s.config.CommitTimeout,
		fmt.Errorf("commit of %d verdicts timed out after %s", len(round), s.config.CommitTimeout))
	defer cancel()
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return s.write(ctx, tx, round) })
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return err
}

package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// CanaryOutcome is what became of a canary.
type CanaryOutcome string

// Outcomes of a canary.
const (
	CanaryCaught CanaryOutcome = "caught" // an alert fired on it in time
	CanaryMissed CanaryOutcome = "missed"
)

// Canary is an event of an under-trained class, published to see whether an alert fires.
type Canary struct {
	Source      string
	EventID     string
	Model       string
	ClassIndex  int
	ClassLabel  string
	PublishedAt time.Time
	DueAt       time.Time      // by when an alert is expected
	Outcome     CanaryOutcome  // empty while it is open
	Verdict     schema.Outcome // on the event so far, or empty
}

// AddCanary records a canary before it is published, so that its event enters neither review nor statistics. Its two
// times are stored on the server's clock: published now, and due as much later as the canary says.
func (s *Store) AddCanary(ctx context.Context, c Canary) error {
	_, err := s.pool.Exec(ctx, insertCanary,
		c.Source, c.EventID, c.Model, c.ClassIndex, c.ClassLabel, c.DueAt.Sub(c.PublishedAt))
	if err != nil {
		return fmt.Errorf("record canary %s: %w", c.EventID, err)
	}
	return nil
}

// OpenCanaries returns the canaries that can be closed, the oldest first: an alert fired on them, or their time is
// over. Outcome is what to close them with.
func (s *Store) OpenCanaries(ctx context.Context) ([]Canary, error) {
	open, err := list(ctx, s.pool, pgx.RowToStructByPos[Canary], canariesOpen)
	if err != nil {
		return nil, fmt.Errorf("read canaries: %w", err)
	}
	return open, nil
}

// CloseCanary writes the outcome of a canary. It returns false if another process did so before.
func (s *Store) CloseCanary(ctx context.Context, source, id string, outcome CanaryOutcome) (bool, error) {
	tag, err := s.pool.Exec(ctx, closeCanary, source, id, outcome)
	if err != nil {
		return false, fmt.Errorf("close canary %s: %w", id, err)
	}
	return tag.RowsAffected() > 0, nil
}

// CanaryCounts returns how many canaries of a model were published since, by outcome; those still open count under
// "open".
func (s *Store) CanaryCounts(ctx context.Context, model string, since time.Time) (map[string]int, error) {
	rows, err := s.pool.Query(ctx, canaryCounts, model, since)
	if err != nil {
		return nil, fmt.Errorf("count canaries: %w", err)
	}
	counts := map[string]int{}
	var outcome string
	var n int
	if _, err := pgx.ForEachRow(rows, []any{&outcome, &n}, func() error { counts[outcome] = n; return nil }); err != nil {
		return nil, fmt.Errorf("count canaries: %w", err)
	}
	return counts, nil
}

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

// Canary is an event of a class that the ensemble is known to know too little, published to see whether an alert fires.
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

// AddCanary records a canary before it is published, so that its event enters neither review nor statistics. Its two times
// are stored on the server's clock: published now, and due as much later as the canary says.
func (s *Store) AddCanary(ctx context.Context, c Canary) error {
	_, err := s.pool.Exec(ctx, `INSERT INTO decuwatch.canaries (source, event_id, model, class_index, class_label, published_at, due_at)
		VALUES ($1, $2, $3, $4, $5, clock_timestamp(), clock_timestamp() + $6::interval) ON CONFLICT DO NOTHING`,
		c.Source, c.EventID, c.Model, c.ClassIndex, c.ClassLabel, c.DueAt.Sub(c.PublishedAt))
	if err != nil {
		return fmt.Errorf("record canary %s: %w", c.EventID, err)
	}
	return nil
}

// OpenCanaries returns the canaries that are not decided and on which an alert fired or whose time is over, the oldest first;
// Outcome says what they are to be closed with.
func (s *Store) OpenCanaries(ctx context.Context) ([]Canary, error) {
	rows, err := s.pool.Query(ctx, `SELECT * FROM (
			SELECT c.source, c.event_id, c.model, c.class_index, c.class_label, c.published_at, c.due_at,
				CASE WHEN EXISTS (SELECT FROM decuwatch.alerts a WHERE a.source = c.source AND a.event_id = c.event_id
					AND a.model = c.model AND a.kind = 'score') THEN 'caught'
					WHEN c.due_at <= clock_timestamp() THEN 'missed' END AS decided,
				coalesce((SELECT e.outcome FROM decuwatch.events e WHERE e.source = c.source AND e.event_id = c.event_id AND e.model = c.model), '')
			FROM decuwatch.canaries c WHERE c.outcome IS NULL) open
		WHERE decided IS NOT NULL ORDER BY published_at LIMIT 1000`)
	if err != nil {
		return nil, fmt.Errorf("read canaries: %w", err)
	}
	open, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Canary])
	if err != nil {
		return nil, fmt.Errorf("read canaries: %w", err)
	}
	return open, nil
}

// CloseCanary writes the outcome of a canary. It returns false where another process did so before.
func (s *Store) CloseCanary(ctx context.Context, source, id string, outcome CanaryOutcome) (bool, error) {
	tag, err := s.pool.Exec(ctx, `UPDATE decuwatch.canaries SET outcome = $3, decided_at = clock_timestamp()
		WHERE source = $1 AND event_id = $2 AND outcome IS NULL`, source, id, outcome)
	if err != nil {
		return false, fmt.Errorf("close canary %s: %w", id, err)
	}
	return tag.RowsAffected() > 0, nil
}

// CanaryCounts returns how many canaries of a model were published since, by outcome; those still open count under "open".
func (s *Store) CanaryCounts(ctx context.Context, model string, since time.Time) (map[string]int, error) {
	rows, err := s.pool.Query(ctx, `SELECT coalesce(outcome, 'open'), count(*) FROM decuwatch.canaries
		WHERE ($1 = '' OR model = $1) AND published_at >= $2 GROUP BY 1`, model, since)
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

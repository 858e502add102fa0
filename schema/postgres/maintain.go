package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

func monthOf(t time.Time) time.Time {
	t = t.UTC()
	return time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
}

// ensureMonth creates the partition for the month of an event's time if it is not known to exist. The error is
// *schema.Invalid if the event is older than scores are kept, or in no month that a partition may have.
func (s *Store) ensureMonth(ctx context.Context, t time.Time) error {
	month := monthOf(t)
	if _, ok := s.months.Load(month); ok {
		return nil
	}
	var oldest *time.Time
	err := s.pool.QueryRow(ctx, ensurePartition, t, s.config.Maintenance.Scores).Scan(&oldest)
	var e *pgconn.PgError
	if errors.As(err, &e) && e.Code == "23514" {
		return &schema.Invalid{Field: "time", Reason: e.Message}
	}
	if err != nil {
		return fmt.Errorf("create partition of %s: %w", month.Format("2006-01"), err)
	}
	if oldest != nil {
		return s.tooOld(t, *oldest)
	}
	s.months.Store(month, struct{}{})
	return nil
}

// CheckAge returns *schema.Invalid on the field time for an event that was older than scores are kept when its stream
// stored it, so that no work is done on it. Record has the last word, on the server's clock. A zero stored time passes.
func (s *Store) CheckAge(event, stored time.Time) error {
	if oldest := stored.Add(-s.config.Maintenance.Scores); !stored.IsZero() && event.Before(oldest) {
		return s.tooOld(event, oldest)
	}
	return nil
}

// tooOld is the refusal of an event that is older than scores are kept.
func (s *Store) tooOld(t, oldest time.Time) error {
	return &schema.Invalid{Field: "time",
		Reason: fmt.Sprintf("%s is before %s: scores are kept for %s (retention.scores), and an older event is not scored",
			t.UTC().Format(time.RFC3339), oldest.UTC().Truncate(time.Second).Format(time.RFC3339),
			days(s.config.Maintenance.Scores))}
}

// days writes a retention as an operator says it.
func days(d time.Duration) string {
	if d%day == 0 {
		return fmt.Sprintf("%d days", d/day)
	}
	return d.String()
}

// EnsurePartitions creates the partitions of the present month and of the given number of months after it, on the
// server's clock.
func (s *Store) EnsurePartitions(ctx context.Context, ahead int) error {
	months, err := list(ctx, s.pool, pgx.RowTo[time.Time], ensurePartitions, ahead)
	if err != nil {
		return fmt.Errorf("create partitions: %w", err)
	}
	for _, month := range months {
		s.months.Store(monthOf(month), struct{}{})
	}
	return nil
}

// DropOldScores drops the partitions of scores whose month ended longer ago than keep and a day, on the server's clock,
// and returns their names.
func (s *Store) DropOldScores(ctx context.Context, keep time.Duration) ([]string, error) {
	var dropped []string
	if err := s.pool.QueryRow(ctx, `SELECT decuwatch.drop_old_scores($1)`, keep).Scan(&dropped); err != nil {
		return nil, fmt.Errorf("drop old scores: %w", err)
	}
	if len(dropped) > 0 {
		s.months.Clear()
	}
	return dropped, nil
}

const day = 24 * time.Hour

// Maintenance says how long what is kept. Ages are measured on the server's clock, and the database refuses retentions
// below the least ones of [Maintenance.Retentions]. Fields with a name are settings.
type Maintenance struct {
	// How long scores are kept, by whole months, at least 720h (30 days); older events are refused. Defaults to 9600h
	// (400 days).
	Scores time.Duration `name:"scores" default:"9600h"`
	// How long alerts and their reviews are kept, at least 720h. Defaults to 19200h (800 days).
	Alerts time.Duration `name:"alerts" default:"19200h"`
	// How long the ledger, skips and dead letters are kept, at least 720h; longer than the stream keeps messages.
	// Defaults to 9600h (400 days).
	Events time.Duration `name:"events" default:"9600h"`
	// How long payloads of dead letters that are the producer's fault are kept, at least 24h; the rest of the row
	// stays. Defaults to 720h (30 days).
	Payloads time.Duration `name:"payloads" default:"720h"`
	// How long images of reviews are kept, at least 1h. Defaults to 2160h (90 days).
	Evidence time.Duration `name:"evidence" default:"2160h"`
	// Months for which partitions of scores exist in advance, 1 to 12.
	Ahead int `name:"partitions-ahead" default:"2" min:"1" max:"12"`

	Deliveries time.Duration `kong:"-"` // outbox rows after delivery. Defaults to 7 days, at least 1
	Rollups    time.Duration `kong:"-"` // hourly and daily sums. Defaults to 1200 days, at least 30
}

// Retention is how long one kind of data is kept.
type Retention struct {
	Kind  string        // as the database names it: scores, events, payloads, alerts, evidence, deliveries, rollups
	Keep  time.Duration //
	Least time.Duration // the database deletes nothing that is younger
}

// Retentions returns how long each kind of data is kept.
func (m Maintenance) Retentions() []Retention {
	return []Retention{
		{"scores", m.Scores, 30 * day}, {"events", m.Events, 30 * day}, {"payloads", m.Payloads, day},
		{"alerts", m.Alerts, 30 * day}, {"evidence", m.Evidence, time.Hour},
		{"deliveries", cmp.Or(m.Deliveries, 7*day), day}, {"rollups", cmp.Or(m.Rollups, 1200*day), 30 * day},
	}
}

// Check returns an error that names the settings out of their bounds.
func (m Maintenance) Check() error {
	errs := []error{settings.Check("retention", m)}
	for _, r := range m.Retentions() {
		if r.Keep < r.Least {
			errs = append(errs, settings.Errorf("retention.%s is %s, must be at least %s", r.Kind, r.Keep, r.Least))
		}
	}
	return errors.Join(errs...)
}

// maintainEvery is the time between two turns of [Store.Maintain].
const maintainEvery = time.Minute

// Maintain tends the database until ctx ends: partitions ahead, retention, rollups folded. What fails is logged and
// tried again at the next turn. Several monitors may do so on one database.
func (s *Store) Maintain(ctx context.Context) {
	for {
		if err := s.MaintainOnce(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("tending the database failed", "retry", maintainEvery, "err", err)
		}
		select {
		case <-time.After(maintainEvery):
		case <-ctx.Done():
			return
		}
	}
}

// MaintainOnce is one turn of Maintain.
func (s *Store) MaintainOnce(ctx context.Context) error {
	m := s.config.Maintenance
	errs := []error{s.EnsurePartitions(ctx, m.Ahead), s.Fold(ctx)}
	dropped, err := s.DropOldScores(ctx, m.Scores)
	errs = append(errs, err)
	for _, name := range dropped {
		s.log.Info("dropped a partition of scores past its retention", "partition", name)
	}
	for _, r := range m.Retentions() {
		switch r.Kind {
		case "scores": // dropped by months
		case "payloads":
			errs = append(errs, s.untilDone(ctx, "expire payloads", `SELECT decuwatch.expire_payloads($1)`, r.Keep))
		default:
			errs = append(errs, s.untilDone(ctx, "delete old "+r.Kind, `SELECT decuwatch.delete_old($2, $1)`, r.Keep, r.Kind))
		}
	}
	return errors.Join(errs...)
}

// untilDone calls a function that works in chunks, so that no transaction runs long, until it finds nothing more to do.
func (s *Store) untilDone(ctx context.Context, name, sql string, args ...any) error {
	for {
		var n int64
		if err := s.pool.QueryRow(ctx, sql, args...).Scan(&n); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if n == 0 {
			return nil
		}
	}
}

// Fold folds the rows that commits added to the rollups into one row a key. What the views show does not change.
func (s *Store) Fold(ctx context.Context) error {
	if _, err := s.pool.Exec(ctx, `SELECT decuwatch.fold()`); err != nil {
		return fmt.Errorf("fold rollups: %w", err)
	}
	return nil
}

package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/decuwatch/decuwatch/schema"
)

func monthOf(t time.Time) time.Time {
	t = t.UTC()
	return time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
}

// ensureMonth creates the partition for the month of t where it is not known to exist.
func (s *Store) ensureMonth(ctx context.Context, t time.Time) error {
	month := monthOf(t)
	if _, ok := s.months.Load(month); ok {
		return nil
	}
	_, err := s.pool.Exec(ctx, `SELECT decuwatch.ensure_partition($1)`, month)
	var e *pgconn.PgError
	if errors.As(err, &e) && e.Code == "23514" {
		return &schema.Invalid{Field: "time", Reason: e.Message}
	}
	if err != nil {
		return fmt.Errorf("create partition of %s: %w", month.Format("2006-01"), err)
	}
	s.months.Store(month, struct{}{})
	return nil
}

// EnsurePartitions creates the partitions of the present month and of so many after it.
func (s *Store) EnsurePartitions(ctx context.Context, ahead int) error {
	now := monthOf(time.Now())
	for i := range ahead + 1 {
		if err := s.ensureMonth(ctx, now.AddDate(0, i, 0)); err != nil {
			return err
		}
	}
	return nil
}

// DropPartitions drops the partitions of scores whose whole month lies before the moment, and returns their names.
func (s *Store) DropPartitions(ctx context.Context, before time.Time) ([]string, error) {
	var dropped []string
	if err := s.pool.QueryRow(ctx, `SELECT decuwatch.drop_partitions($1)`, before).Scan(&dropped); err != nil {
		return nil, fmt.Errorf("drop partitions: %w", err)
	}
	if len(dropped) > 0 {
		s.months.Clear()
	}
	return dropped, nil
}

// Maintenance says how long what is kept, and how often the database is tended.
type Maintenance struct {
	Every       time.Duration // Defaults to 1 minute
	Ahead       int           // months for which partitions exist in advance. Defaults to 2
	Scores      time.Duration // by whole months. Defaults to 400 days
	Alerts      time.Duration // alerts and their reviews. Defaults to 800 days
	Events      time.Duration // ledger, skips and dead letters; must be longer than the stream keeps messages. Defaults to 400 days
	Evidence    time.Duration // images of reviews. Defaults to 90 days
	Deliveries  time.Duration // outbox rows after delivery. Defaults to 7 days
	HourlySums  time.Duration // hourly and daily rollups. Defaults to 1200 days
	ChunkPerRun int           // rows of a table deleted in one transaction. Defaults to 10,000
}

// WithDefaults returns the configuration with every field that is not set at its default.
func (m Maintenance) WithDefaults() Maintenance {
	const day = 24 * time.Hour
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{{&m.Every, time.Minute}, {&m.Scores, 400 * day}, {&m.Alerts, 800 * day}, {&m.Events, 400 * day}, {&m.Evidence, 90 * day}, {&m.Deliveries, 7 * day}, {&m.HourlySums, 1200 * day}} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if m.Ahead == 0 {
		m.Ahead = 2
	}
	if m.ChunkPerRun == 0 {
		m.ChunkPerRun = 10_000
	}
	return m
}

// Maintain tends the database until ctx ends: partitions ahead, retention, rollups folded. What fails is logged and
// tried again at the next turn. Several monitors may do so on one database.
func (s *Store) Maintain(ctx context.Context, m Maintenance) {
	m = m.WithDefaults()
	for {
		if err := s.MaintainOnce(ctx, m); err != nil && ctx.Err() == nil {
			s.log.Warn("tending the database failed", "retry", m.Every, "err", err)
		}
		select {
		case <-time.After(m.Every):
		case <-ctx.Done():
			return
		}
	}
}

// MaintainOnce is one turn of Maintain.
func (s *Store) MaintainOnce(ctx context.Context, m Maintenance) error {
	m = m.WithDefaults()
	now := time.Now()
	errs := []error{s.EnsurePartitions(ctx, m.Ahead), s.Fold(ctx)}
	dropped, err := s.DropPartitions(ctx, now.Add(-m.Scores))
	errs = append(errs, err)
	for _, name := range dropped {
		s.log.Info("dropped a partition of scores past its retention", "partition", name)
	}
	for _, old := range []struct {
		table, column string
		keep          time.Duration
	}{
		{"evidence", "made_at", m.Evidence},
		{"outbox", "delivered_at", m.Deliveries},
		{"alerts", "recorded_at", m.Alerts},
		{"reviews", "opened_at", m.Alerts},
		{"canaries", "published_at", m.Alerts},
		{"events", "recorded_at", m.Events},
		{"skips", "recorded_at", m.Events},
		{"dead_letters", "recorded_at", m.Events},
		{"class_hour_parts", "hour", m.HourlySums},
		{"class_day_parts", "day", m.HourlySums},
		{"outcome_hour_parts", "hour", m.HourlySums},
	} {
		errs = append(errs, s.deleteOld(ctx, old.table, old.column, now.Add(-old.keep), m.ChunkPerRun))
	}
	return errors.Join(errs...)
}

// deleteOld deletes in chunks, so that no transaction runs long.
func (s *Store) deleteOld(ctx context.Context, table, column string, before time.Time, chunk int) error {
	for {
		tag, err := s.pool.Exec(ctx, `DELETE FROM decuwatch.`+table+` WHERE ctid = ANY (ARRAY(
			SELECT ctid FROM decuwatch.`+table+` WHERE `+column+` < $1 LIMIT $2))`, before, chunk)
		if err != nil {
			return fmt.Errorf("delete old rows of %s: %w", table, err)
		}
		if tag.RowsAffected() < int64(chunk) {
			return nil
		}
	}
}

// Fold folds the rows that commits added to the rollups into one row a key. What the views show does not change.
func (s *Store) Fold(ctx context.Context) error {
	return s.begin(ctx, "fold rollups", func(tx pgx.Tx) error {
		var free bool
		if err := tx.QueryRow(ctx, `SELECT pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtext('decuwatch.fold'))`).Scan(&free); err != nil || !free {
			return err // another monitor folds
		}
		for table, span := range map[string]string{"class_hour_parts": "hour", "class_day_parts": "day"} {
			columns := strings.Replace(classHourColumns, "hour", span, 1)
			_, err := tx.Exec(ctx, strings.NewReplacer("TABLE", table, "SPAN", span, "COLUMNS", columns).Replace(`
				WITH keys AS (
					SELECT DISTINCT SPAN, model, ensemble_digest, settings, class_index FROM decuwatch.TABLE WHERE NOT folded
				), gone AS (
					DELETE FROM decuwatch.TABLE p USING keys k
					WHERE p.SPAN = k.SPAN AND p.model = k.model AND p.ensemble_digest = k.ensemble_digest AND p.settings = k.settings AND p.class_index = k.class_index
					RETURNING p.*
				)
				INSERT INTO decuwatch.TABLE (COLUMNS)
				SELECT SPAN, model, ensemble_digest, settings, class_index, class_label, sum(n), sum(class_gap_sum), sum(class_gap_squares),
					min(class_gap_min), max(class_gap_max), sum(class_gap_saturated), sum(request_risk_sum), sum(request_risk_squares),
					min(request_risk_min), max(request_risk_max), sum(request_risk_saturated), sum(warnings), sum(criticals), true
				FROM gone GROUP BY SPAN, model, ensemble_digest, settings, class_index, class_label`))
			if err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, `
			WITH keys AS (
				SELECT DISTINCT hour, model, outcome, reason FROM decuwatch.outcome_hour_parts WHERE NOT folded
			), gone AS (
				DELETE FROM decuwatch.outcome_hour_parts p USING keys k
				WHERE p.hour = k.hour AND p.model = k.model AND p.outcome = k.outcome AND p.reason = k.reason RETURNING p.*
			)
			INSERT INTO decuwatch.outcome_hour_parts (`+outcomeHourColumns+`)
			SELECT hour, model, outcome, reason, sum(n), true FROM gone GROUP BY hour, model, outcome, reason`)
		return err
	})
}

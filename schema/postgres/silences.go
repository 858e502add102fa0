package postgres

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// MaxSilence bounds how long a silence lasts, and how far ahead it begins.
const MaxSilence = 366 * 24 * time.Hour

// Silence keeps the alerts of a model, class or measurement from being sent for a time. They are stored and enter
// review all the same. Alerts on scores and on the drift of a class are silenced, others never.
type Silence struct {
	ID          int64                  `json:"id"`
	Model       string                 `json:"model"`
	ClassIndex  *int                   `json:"class_index"` // nil silences every class
	ClassLabel  string                 `json:"class_label"`
	Measurement schema.MeasurementName `json:"measurement"` // empty silences every measurement
	StartsAt    time.Time              `json:"starts_at"`
	EndsAt      time.Time              `json:"ends_at"`
	Author      string                 `json:"author"`
	Reason      string                 `json:"reason"`
	CreatedAt   time.Time              `json:"created_at"`
	EndedBy     string                 `json:"ended_by"` // who ended it early; empty if nobody did
	EndedAt     *time.Time             `json:"ended_at"`
	InForce     bool                   `json:"in_force"`
	Silenced    int                    `json:"silenced"` // alerts that it kept from being sent
}

// matches reports whether the silence is about an alert.
func (s Silence) matches(a schema.Alert) bool {
	return (a.Kind == schema.AlertScore || a.Kind == schema.AlertClassDrift) && s.Model == a.Model &&
		(s.ClassIndex == nil || *s.ClassIndex == a.ClassIndex) && (s.Measurement == "" || s.Measurement == a.Measurement)
}

// AddSilence adds a silence that begins at its StartsAt, or now if that is zero, and lasts for a time. It returns its
// number.
func (s *Store) AddSilence(ctx context.Context, add Silence, lasts time.Duration) (int64, error) {
	var start *time.Time
	if !add.StartsAt.IsZero() {
		start = &add.StartsAt
	}
	var id int64
	err := s.pool.QueryRow(ctx, insertSilence, clean(add.Model), add.ClassIndex, clean(add.ClassLabel),
		optional(add.Measurement), start, lasts, clean(add.Author), clean(add.Reason)).Scan(&id)
	if err != nil {
		return 0, fmt.Errorf("add silence: %w", err)
	}
	return id, nil
}

// EndSilence ends a silence early. The error is ErrNotFound if it does not exist or has ended.
func (s *Store) EndSilence(ctx context.Context, id int64, by string) error {
	tag, err := s.pool.Exec(ctx, endSilence, id, clean(by))
	if err == nil && tag.RowsAffected() == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("end silence %d: %w", id, err)
	}
	return nil
}

// Silences returns silences, the newest first, at most limit. An empty model means all of them. Past ones are left out
// unless they are asked for.
func (s *Store) Silences(ctx context.Context, model string, past bool, limit int) ([]Silence, error) {
	found, err := list(ctx, s.pool, pgx.RowTo[Silence], silencesList, model, past, limit)
	if err != nil {
		return nil, fmt.Errorf("read silences: %w", err)
	}
	return found, nil
}

// SilenceCounts returns how many silences of each model are in force.
func (s *Store) SilenceCounts(ctx context.Context) (map[string]int, error) {
	rows, err := s.pool.Query(ctx, silenceCounts)
	if err != nil {
		return nil, fmt.Errorf("count silences: %w", err)
	}
	counts := map[string]int{}
	var model string
	var n int
	if _, err := pgx.ForEachRow(rows, []any{&model, &n}, func() error { counts[model] = n; return nil }); err != nil {
		return nil, fmt.Errorf("count silences: %w", err)
	}
	return counts, nil
}

// applySilences marks the alerts that a silence in force is about.
func applySilences(ctx context.Context, tx pgx.Tx, alerts []*alertRow) error {
	var models []string
	for _, a := range alerts {
		if !slices.Contains(models, a.Model) {
			models = append(models, a.Model)
		}
	}
	if len(models) == 0 {
		return nil
	}
	silences, err := list(ctx, tx, func(row pgx.CollectableRow) (s Silence, err error) {
		var measurement *string
		err = row.Scan(&s.ID, &s.Model, &s.ClassIndex, &measurement)
		s.Measurement = schema.MeasurementName(text(measurement))
		return s, err
	}, silencesInForce, models)
	if err != nil {
		return fmt.Errorf("read silences: %w", err)
	}
	for i := range alerts {
		a := alerts[i]
		if at := slices.IndexFunc(silences, func(s Silence) bool { return s.matches(a.Alert) }); at >= 0 {
			a.Delivery, a.SilenceID = schema.DispatchSilenced, &silences[at].ID
		}
	}
	return nil
}

package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// HeldBack counts the alerts recorded in [from, to) that were not sent, by hour, class and severity.
func (s *Store) HeldBack(ctx context.Context, from, to time.Time) ([]schema.HeldBack, error) {
	counts, err := list(ctx, s.pool, func(row pgx.CollectableRow) (h schema.HeldBack, err error) {
		err = row.Scan(&h.Hour, &h.Model, &h.ClassIndex, &h.ClassLabel, &h.Severity, &h.ClassBudget, &h.ModelBudget,
			&h.CoolDown)
		h.Hour = h.Hour.UTC()
		return h, err
	}, alertsHeldBack, from, to)
	if err != nil {
		return nil, fmt.Errorf("count alerts that were not sent: %w", err)
	}
	return counts, nil
}

// ClassSequences returns the class gaps of each class's newest scores by one ensemble under one settings key, at most
// limit of them with event times after since, and after quiet has passed since the class's last alert of a drift.
// Canaries are left out.
func (s *Store) ClassSequences(ctx context.Context, model, ensembleDigest, settings string, since time.Time,
	quiet time.Duration, limit int) ([]schema.ClassSequence, error) {
	rows, err := s.pool.Query(ctx, classSequences, model, ensembleDigest, settings, since, quiet, limit)
	if err != nil {
		return nil, fmt.Errorf("read sequences of scores: %w", err)
	}
	var sequences []schema.ClassSequence
	var class int
	var label, last string
	var at time.Time
	var value float64
	_, err = pgx.ForEachRow(rows, []any{&class, &label, &at, &last, &value}, func() error {
		if n := len(sequences); n == 0 || sequences[n-1].ClassIndex != class {
			sequences = append(sequences, schema.ClassSequence{ClassIndex: class, ClassLabel: label})
		}
		q := &sequences[len(sequences)-1]
		q.Last = last
		q.Times, q.Values = append(q.Times, at.UTC()), append(q.Values, value)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read sequences of scores: %w", err)
	}
	return sequences, nil
}

// Tail returns the value that at most a share alpha of the scores of some classes since a moment reach, for one
// measurement, and how many scores there were, canaries left out. The value means nothing if there were fewer than
// 1/alpha.
func (s *Store) Tail(ctx context.Context, model, ensembleDigest, settings string, measurement schema.MeasurementName,
	classes []int, since time.Time, alpha float64) (value float64, n int, err error) {
	if measurement != schema.ClassGap && measurement != schema.RequestRisk {
		return 0, 0, fmt.Errorf("read tail of scores: measurement %q is neither class_gap nor request_risk", measurement)
	}
	err = s.pool.QueryRow(ctx, scoresTail,
		model, ensembleDigest, settings, classes, since, alpha, measurement).Scan(&value, &n)
	if err != nil {
		return 0, 0, fmt.Errorf("read tail of scores: %w", err)
	}
	return value, n, nil
}

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

// ClassSequences returns the class gaps of each class's newest scores of a series, at most limit of them with event
// times after since, and after quiet has passed since the class's last alert of a drift. Canaries are left out.
func (s *Store) ClassSequences(
	ctx context.Context, of schema.Series, since time.Time, quiet time.Duration, limit int,
) ([]schema.ClassSequence, error) {
	rows, err := s.pool.Query(ctx, classSequences, of.Model, of.EnsembleDigest, of.Settings, since, quiet, limit)
	if err != nil {
		return nil, fmt.Errorf("read sequences of scores: %w", err)
	}
	var sequences []schema.ClassSequence
	var class int
	var label, last string
	var at time.Time
	var value, weight float64
	_, err = pgx.ForEachRow(rows, []any{&class, &label, &at, &last, &value, &weight}, func() error {
		if n := len(sequences); n == 0 || sequences[n-1].ClassIndex != class {
			sequences = append(sequences, schema.ClassSequence{ClassIndex: class, ClassLabel: label})
		}
		q := &sequences[len(sequences)-1]
		q.Last = last
		q.Times, q.Values = append(q.Times, at.UTC()), append(q.Values, value)
		q.Weights = append(q.Weights, weight)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read sequences of scores: %w", err)
	}
	return sequences, nil
}

// ClassGapDistances returns the mean distance of the class gap of the newest scores of some classes of a series, at
// most limit of each with event times since a moment. Scores of canaries count. Classes without scores are left out.
func (s *Store) ClassGapDistances(
	ctx context.Context, of schema.Series, classes []int, since time.Time, limit int,
) ([]schema.ClassDistance, error) {
	means, err := list(ctx, s.pool, pgx.RowToStructByPos[schema.ClassDistance], classGapDistances,
		of.Model, of.EnsembleDigest, of.Settings, classes, since, limit)
	if err != nil {
		return nil, fmt.Errorf("read distances of class gaps: %w", err)
	}
	return means, nil
}

// Tail returns the value of a measurement that at most a share alpha of the requests of some classes since a moment
// reach, and the number of scores, which are weighed by the inverse of their inclusion probability. Canaries are left
// out. The value means nothing if the number is below 1/alpha.
func (s *Store) Tail(
	ctx context.Context, of schema.Series, measurement schema.MeasurementName, classes []int, since time.Time,
	alpha float64,
) (value float64, n int, err error) {
	if err := checkName(measurement); err != nil {
		return 0, 0, err
	}
	err = s.pool.QueryRow(ctx, scoresTail,
		of.Model, of.EnsembleDigest, of.Settings, classes, since, alpha, measurement).Scan(&value, &n)
	if err != nil {
		return 0, 0, fmt.Errorf("read tail of scores: %w", err)
	}
	return value, n, nil
}

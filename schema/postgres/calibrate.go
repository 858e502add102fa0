package postgres

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// checkName returns an error if no measurement has the name.
func checkName(measurement schema.MeasurementName) error {
	if !slices.Contains(schema.MeasurementNames(), measurement) {
		return fmt.Errorf("read scores: measurement %q is not one of %s", measurement,
			schema.List(schema.MeasurementNames()))
	}
	return nil
}

// Samples returns one measurement of the scores of a series that have it, with event times in [from, to). Canaries, and
// events whose alert a reviewer confirmed, are left out: they are no reference for what is usual. Each sample has its
// weight.
func (s *Store) Samples(
	ctx context.Context, of schema.Series, measurement schema.MeasurementName, from, to time.Time,
) ([]schema.Sample, error) {
	if err := checkName(measurement); err != nil {
		return nil, err
	}
	samples, err := list(ctx, s.pool, pgx.RowToStructByPos[schema.Sample], samples,
		of.Model, of.EnsembleDigest, of.Settings, from, to, measurement)
	if err != nil {
		return nil, fmt.Errorf("read scores: %w", err)
	}
	return samples, nil
}

package postgres

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// Samples returns one measurement of the scores of a series, with event times in [from, to). Canaries, and events whose
// alert a reviewer confirmed, are left out: they are no reference for what is usual.
func (s *Store) Samples(
	ctx context.Context, of schema.Series, measurement schema.MeasurementName, from, to time.Time,
) ([]schema.Sample, error) {
	if !slices.Contains(schema.MeasurementNames(), measurement) {
		return nil, fmt.Errorf("read scores: measurement %q is neither class_gap nor request_risk", measurement)
	}
	m := string(measurement)
	rows, err := s.pool.Query(ctx, `SELECT class_index, `+m+`, `+m+`_mean_distance, `+m+`_saturated
		FROM decuwatch.scores s
		WHERE model = $1 AND ensemble_digest = $2 AND settings = $3 AND event_time >= $4 AND event_time < $5
		AND NOT EXISTS (SELECT FROM decuwatch.canaries c WHERE c.source = s.source AND c.event_id = s.event_id AND c.model = s.model)
		AND NOT EXISTS (SELECT FROM decuwatch.reviews r
			WHERE r.verdict = 'confirmed' AND r.source = s.source AND r.event_id = s.event_id AND r.model = s.model)`,
		of.Model, of.EnsembleDigest, of.Settings, from, to)
	if err != nil {
		return nil, fmt.Errorf("read scores: %w", err)
	}
	samples, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s schema.Sample, err error) {
		err = row.Scan(&s.Class, &s.Value, &s.Distance, &s.Saturated)
		return s, err
	})
	if err != nil {
		return nil, fmt.Errorf("read scores: %w", err)
	}
	return samples, nil
}

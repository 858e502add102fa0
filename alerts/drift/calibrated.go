package drift

import (
	"context"
	"slices"
	"time"

	"github.com/decuwatch/decuwatch/schema"
)

// Samples reads one measurement of stored scores: a *postgres.Store.
type Samples interface {
	Samples(ctx context.Context, of schema.Series, m schema.MeasurementName, from, to time.Time) ([]schema.Sample, error)
}

// Calibrated returns the class gaps of the well-sampled classes in the window from which the newest threshold of the
// model was calibrated. It is empty if no threshold was calibrated, or retention dropped the scores.
func Calibrated(
	ctx context.Context, of schema.Series, wellSampled []int, thresholds []schema.Threshold, stored Samples,
) (Reference, error) {
	var newest schema.Threshold
	for _, t := range thresholds {
		if t.Series() == of && t.Measurement == schema.ClassGap && t.Scope == schema.ScopeModel && t.Origin == "calibrated" &&
			t.WindowFrom != nil && t.WindowTo != nil && t.ID >= newest.ID {
			newest = t
		}
	}
	if newest.WindowFrom == nil {
		return Reference{}, nil
	}
	samples, err := stored.Samples(ctx, of, schema.ClassGap, *newest.WindowFrom, *newest.WindowTo)
	if err != nil {
		return Reference{}, err
	}
	var gaps, weights []float64
	for _, s := range samples {
		if slices.Contains(wellSampled, s.Class) {
			gaps, weights = append(gaps, s.Value), append(weights, s.Requests())
		}
	}
	return NewReference(gaps, weights), nil
}

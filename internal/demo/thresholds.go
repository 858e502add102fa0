package demo

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Quantiles of the reference that become the demo's thresholds.
var referenceQuantiles = []struct {
	quantile float64
	severity schema.Severity
}{{0.99, schema.SeverityWarn}, {0.999, schema.SeverityCritical}}

// referenceThresholds sets the model's first thresholds from the ensemble's reference, the scores of its well-sampled
// classes, unless it has thresholds. It says what it did.
func referenceThresholds(ctx context.Context, store *postgres.Store, e *ensemble.Ensemble) (string, error) {
	list, err := store.Thresholds(ctx)
	if err != nil {
		return "", err
	}
	series := seriesOf(e)
	own := slices.DeleteFunc(list, func(t schema.Threshold) bool { return t.Series() != series })
	if len(own) > 0 {
		return fmt.Sprintf("%d, as they stood", len(own)), nil
	}
	change := postgres.ThresholdChange{
		Kind: postgres.ChangeReference, SetBy: "demo", Reason: "quantiles of the ensemble's reference scores",
	}
	var said []string
	for _, measurement := range schema.MeasurementNames() {
		reference := e.Reference[string(measurement)]
		for _, q := range referenceQuantiles {
			value, ok := reference.Quantiles[strconv.FormatFloat(q.quantile, 'g', -1, 64)]
			if !ok {
				continue
			}
			alpha := math.Round((1-q.quantile)*1e6) / 1e6
			change.Thresholds = append(change.Thresholds, schema.Threshold{
				Model: e.Name, EnsembleDigest: e.Digest, Settings: series.Settings, Measurement: measurement,
				Scope: schema.ScopeModel, Severity: q.severity, Value: value, Origin: "reference", N: reference.N,
				Alpha: &alpha, SetBy: change.SetBy, Reason: change.Reason,
			})
			said = append(said, fmt.Sprintf("%s %s from %.4g", measurement, q.severity, value))
		}
	}
	if len(change.Thresholds) == 0 {
		return "none: the ensemble brings no reference scores, so nothing raises an alert (decuwatch thresholds set)", nil
	}
	if _, err := store.SetThresholds(ctx, change); err != nil {
		return "", err
	}
	return strings.Join(said, ", "), nil
}

// seriesOf returns the series of the scores that an ensemble makes with its fixed profile.
func seriesOf(e *ensemble.Ensemble) schema.Series {
	return schema.Series{Model: e.Name, EnsembleDigest: e.Digest, Settings: e.Profile.Settings()}
}

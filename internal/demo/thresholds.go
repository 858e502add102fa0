package demo

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// referenceThresholds sets the model's first thresholds as `thresholds from-reference --apply` does, unless the model
// has thresholds. It returns lines that say what it did.
func referenceThresholds(ctx context.Context, store *postgres.Store, e *ensemble.Ensemble) ([]string, error) {
	list, err := store.Thresholds(ctx)
	if err != nil {
		return nil, err
	}
	own := slices.DeleteFunc(list, func(t schema.Threshold) bool { return t.Series() != app.SeriesOf(e) })
	if len(own) > 0 {
		return []string{fmt.Sprintf("%d, as they stood", len(own))}, nil
	}
	change := postgres.ThresholdChange{
		Kind: postgres.ChangeReference, SetBy: "demo", Reason: "quantiles of the ensemble's reference scores",
		Thresholds: app.ReferenceThresholds(e),
	}
	if len(change.Thresholds) == 0 {
		return []string{"none, so no alert fires: the ensemble brings no reference scores (decuwatch thresholds set)"}, nil
	}
	if _, err := store.SetThresholds(ctx, change); err != nil {
		return nil, err
	}
	said := []string{"from the ensemble's reference scores (decuwatch thresholds from-reference)"}
	for _, name := range schema.MeasurementNames() {
		var values []string
		for _, t := range change.Thresholds {
			if t.Measurement == name {
				values = append(values, fmt.Sprintf("%s from %.4g", t.Severity, t.Value))
			}
		}
		if len(values) > 0 {
			said = append(said, fmt.Sprintf("%s: %s", name, strings.Join(values, ", ")))
		}
	}
	return said, nil
}

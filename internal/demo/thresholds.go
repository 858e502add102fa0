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
// has thresholds. It says what it did.
func referenceThresholds(ctx context.Context, store *postgres.Store, e *ensemble.Ensemble) (string, error) {
	list, err := store.Thresholds(ctx)
	if err != nil {
		return "", err
	}
	own := slices.DeleteFunc(list, func(t schema.Threshold) bool { return t.Series() != app.SeriesOf(e) })
	if len(own) > 0 {
		return fmt.Sprintf("%d, as they stood", len(own)), nil
	}
	change := postgres.ThresholdChange{
		Kind: postgres.ChangeReference, SetBy: "demo", Reason: "quantiles of the ensemble's reference scores",
		Thresholds: app.ReferenceThresholds(e),
	}
	if len(change.Thresholds) == 0 {
		return "none: the ensemble brings no reference scores, so nothing raises an alert (decuwatch thresholds set)", nil
	}
	if _, err := store.SetThresholds(ctx, change); err != nil {
		return "", err
	}
	var said []string
	for _, t := range change.Thresholds {
		said = append(said, fmt.Sprintf("%s %s from %.4g", t.Measurement, t.Severity, t.Value))
	}
	return strings.Join(said, ", ") + " (decuwatch thresholds from-reference)", nil
}

package app

import (
	"context"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/alerts/drift"
	"github.com/decuwatch/decuwatch/alerts/patrol"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// newPatrol returns the patrol of every model. The reference of a model is the scores from which its own threshold was
// calibrated, or else the reference in the ensemble's manifest.
func newPatrol(ctx context.Context, c patrol.Config, engines map[string]*scoring.Engine, store *postgres.Store,
	reg prometheus.Registerer, log *slog.Logger,
) (*patrol.Patrol, error) {
	thresholds, err := store.Thresholds(ctx)
	if err != nil {
		return nil, err
	}
	var models []patrol.Model
	for _, engine := range engines {
		e := engine.Ensemble()
		m := patrol.Model{
			Name: e.Name, EnsembleDigest: e.Digest, Settings: engine.Profile().Settings(), WellSampled: e.WellSampled(),
		}
		if m.Reference, err = drift.Calibrated(ctx, m.Series(), m.WellSampled, thresholds, store); err != nil {
			return nil, err
		}
		if m.Reference.Empty() {
			m.Reference = manifestReference(e, engine.Profile(), log)
		}
		if engine.Profile().Settings() == e.Profile.Settings() {
			m.Expected = closedForm(e)
		}
		models = append(models, m)
	}
	c.Log, c.Registerer = log, reg
	return patrol.New(c, models, store, store, store)
}

// closedForm returns the mean distance of the class gap that the ensemble's manifest expects, by class.
func closedForm(e *ensemble.Ensemble) map[int]float64 {
	expected := map[int]float64{}
	for i, c := range e.Classes {
		if c.ClassGap != nil {
			expected[i] = *c.ClassGap
		}
	}
	return expected
}

// manifestReference returns the quantiles in the ensemble's manifest. It is empty if the manifest has no quantiles,
// or if another profile scores.
func manifestReference(e *ensemble.Ensemble, p scoring.Profile, log *slog.Logger) drift.Reference {
	reference, ok := e.Reference[string(schema.ClassGap)]
	if !ok || p.Settings() != e.Profile.Settings() {
		log.Info("class drift disabled: the ensemble has no reference scores for these settings", "model", e.Name)
		return drift.Reference{}
	}
	r, err := drift.Quantiles(reference.N, reference.Quantiles)
	if err != nil {
		log.Warn("class drift disabled: invalid reference", "model", e.Name, "err", err)
	}
	return r
}

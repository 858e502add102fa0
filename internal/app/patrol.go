package app

import (
	"context"
	"log/slog"
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/alerts/drift"
	"github.com/decuwatch/decuwatch/alerts/patrol"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// VolumeConfig bounds how many alerts on scores are sent. What is held back is stored, enters review, and is summed up by
// one alert an hour.
type VolumeConfig struct {
	// Alerts of a class and severity that are sent in an hour of the clock, at most; 0 is no bound.
	ClassPerHour int `name:"class-per-hour" default:"120" min:"0"`
	// Alerts of a model and severity that are sent in an hour of the clock, at most; 0 is no bound.
	ModelPerHour int `name:"model-per-hour" default:"1200" min:"0"`
	// How long more alerts of the same class, measurement and severity are held back after one was sent. Defaults to
	// 0s: not at all.
	CoolDown time.Duration `name:"cool-down" default:"0s" min:"0s"`
}

func (c VolumeConfig) Check() error { return settings.Check("volume", c) }

func (c VolumeConfig) config() postgres.Volume {
	return postgres.Volume{ClassPerHour: c.ClassPerHour, ModelPerHour: c.ModelPerHour, CoolDown: c.CoolDown}
}

// PatrolConfig says how stored scores are looked over for what no single score shows.
type PatrolConfig struct {
	// Between looks at held-back alerts and stale thresholds.
	Every time.Duration `name:"every" default:"1m" min:"1s"`
	// Requests of a class, on average at least, until a false alarm of its drift.
	RunLength float64 `name:"run-length" default:"10000"`
	// Newest scores of a class that are looked at for a drift.
	Newest int `name:"newest" default:"200" min:"1"`
	// After an alert of a class's drift, how long its scores do not count.
	Quiet time.Duration `name:"quiet" default:"24h" min:"0s"`
}

func (c PatrolConfig) Check() error {
	if !(c.RunLength > 1) || math.IsInf(c.RunLength, 0) {
		return settings.Errorf("patrol.run-length is %g, must be finite and above 1", c.RunLength)
	}
	return settings.Check("patrol", c)
}

// newPatrol returns the patrol of every model. Frozen are the scores from which the model's own threshold was calibrated,
// else the reference of the ensemble's manifest.
func newPatrol(ctx context.Context, c PatrolConfig, engines map[string]*scoring.Engine, store *postgres.Store, reg prometheus.Registerer, log *slog.Logger) (*patrol.Patrol, error) {
	thresholds, err := store.Thresholds(ctx)
	if err != nil {
		return nil, err
	}
	var models []patrol.Model
	for _, engine := range engines {
		e := engine.Ensemble()
		m := patrol.Model{Name: e.Name, EnsembleDigest: e.Digest, Settings: engine.Profile().Settings(), WellSampled: e.WellSampled()}
		if m.Reference, err = drift.Calibrated(ctx, m.Series(), m.WellSampled, thresholds, store); err != nil {
			return nil, err
		}
		if m.Reference.Empty() {
			m.Reference = manifestReference(e, engine.Profile(), log)
		}
		models = append(models, m)
	}
	return patrol.New(patrol.Config{
		Every: c.Every, RunLength: c.RunLength, Newest: c.Newest, Quiet: c.Quiet, Log: log, Registerer: reg,
	}, models, store, store, store)
}

// manifestReference returns the class gaps of the ensemble's well-sampled classes under its own profile, by the quantiles
// of its manifest. It is empty if the manifest has no quantiles, or another profile scores.
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

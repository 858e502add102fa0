package app

import (
	"context"
	"log/slog"
	"maps"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// OpenEngines opens every ensemble of scoring.ensembles, by its name. The lifecycle closes them.
func OpenEngines(c ScoringConfig, reg prometheus.Registerer, log *slog.Logger, life *Lifecycle,
) (map[string]*scoring.Engine, error) {
	engines := map[string]*scoring.Engine{}
	for _, path := range c.Ensembles {
		err := openEngine(path, c.Options, reg, log, life, func(e *ensemble.Ensemble) error {
			if other := engines[e.Name]; other != nil {
				return settings.Errorf("scoring.ensembles: %s (%s) and %s (%s) are both named %s: name one of them in "+
					"scoring.shadows", other.Ensemble().Path, other.Ensemble().Digest, path, e.Digest, e.Name)
			}
			return nil
		}, engines)
		if err != nil {
			return nil, err
		}
	}
	return engines, nil
}

// openShadows opens every ensemble of scoring.shadows, by the name that it shares with a live one. The lifecycle closes
// them.
func openShadows(c ScoringConfig, live map[string]*scoring.Engine, log *slog.Logger, life *Lifecycle,
) (map[string]*scoring.Engine, error) {
	shadows := map[string]*scoring.Engine{}
	for _, path := range c.Shadows {
		err := openEngine(path, c.Options, nil, log, life, func(e *ensemble.Ensemble) error {
			of, other := live[e.Name], shadows[e.Name]
			switch {
			case of == nil:
				return settings.Errorf("scoring.shadows: %s is named %s, must be named as one of scoring.ensembles", path,
					e.Name)
			case of.Ensemble().Digest == e.Digest:
				return settings.Errorf("scoring.shadows: %s is the ensemble %s that scores %s already", path, e.Digest, e.Name)
			case other != nil:
				return settings.Errorf("scoring.shadows: %s (%s) and %s (%s) are both named %s, one is allowed",
					other.Ensemble().Path, other.Ensemble().Digest, path, e.Digest, e.Name)
			}
			return nil
		}, shadows)
		if err != nil {
			return nil, err
		}
	}
	return shadows, nil
}

// openEngine opens the ensemble at a path, if it passes the check, and adds it to engines.
func openEngine(path string, options scoring.Options, reg prometheus.Registerer, log *slog.Logger, life *Lifecycle,
	check func(*ensemble.Ensemble) error, engines map[string]*scoring.Engine,
) error {
	options.Registerer, options.Log = reg, log
	life.doing.Store("start of ensemble " + path)
	defer life.doing.Store("start")
	verified, err := ensemble.Open(path)
	if err == nil {
		err = check(verified)
	}
	if err != nil {
		return err
	}
	engine, err := scoring.New(verified, options)
	if err != nil {
		return err
	}
	engines[verified.Name] = engine
	life.OnStop("ensemble "+path, engine.Close)
	return nil
}

// everyEngine returns the live engines and the shadows.
func everyEngine(live, shadows map[string]*scoring.Engine) []*scoring.Engine {
	return slices.AppendSeq(slices.Collect(maps.Values(live)), maps.Values(shadows))
}

// Models returns how the events of each model are scored.
func Models(engines map[string]*scoring.Engine, c ScoringConfig) (map[string]monitor.Model, error) {
	list := map[string]monitor.Model{}
	for name, engine := range engines {
		cascade, err := c.cascade(engine.Profile().Cascade)
		if err != nil {
			return nil, err
		}
		list[name] = monitor.Model{
			Cascade: cascade,
			Scorer:  engine, Classes: engine.Ensemble().Labels(), Images: engine.Ensemble().TrainingImages(),
			Profile:   engine.Profile(),
			Diffusion: engine.Ensemble().Diffusion, Latent: engine.Ensemble().Latent,
			AsRequested: c.Profile == scoring.ProfileAsRequested, SkipUnreproducible: c.Unreproducible == "skip",
		}
	}
	return list, nil
}

// withLatents lets models score events that name a latent.
func withLatents(models map[string]monitor.Model, latents monitor.Latents) map[string]monitor.Model {
	for name, m := range models {
		m.Latents = latents
		models[name] = m
	}
	return models
}

// warnWithoutThresholds names at the start the models that raise no alert.
func warnWithoutThresholds(ctx context.Context, store *postgres.Store, engines map[string]*scoring.Engine,
	log *slog.Logger,
) {
	list, err := store.Thresholds(ctx)
	if err != nil {
		return // they were read a moment ago; the thresholds' own loop reports it
	}
	for _, engine := range engines {
		series := seriesOf(engine)
		if !slices.ContainsFunc(list, func(t schema.Threshold) bool { return t.Series() == series }) {
			advice := "decuwatch thresholds set --help"
			if len(ReferenceThresholds(engine.Ensemble())) > 0 {
				advice = "decuwatch thresholds from-reference " + engine.Ensemble().Path + " --apply"
			}
			log.Warn("no threshold applies to this ensemble and its settings: scores are stored, but raise no alert",
				"model", series.Model, "ensemble", series.EnsembleDigest, "settings", series.Settings, "run", advice)
		}
	}
}

// SeriesOf returns the series of the scores that an ensemble makes with its fixed profile.
func SeriesOf(e *ensemble.Ensemble) schema.Series {
	return schema.Series{Model: e.Name, EnsembleDigest: e.Digest, Settings: e.Profile.Settings()}
}

// ReferenceThresholds returns the thresholds that an ensemble's reference scores give, or none if it brings none.
func ReferenceThresholds(e *ensemble.Ensemble) (list []schema.Threshold) {
	for _, name := range schema.MeasurementNames() {
		reference := e.Reference[string(name)]
		list = append(list, calibration.FromReference(SeriesOf(e), name, reference.Quantiles, reference.N)...)
	}
	return list
}

package app

import (
	"context"
	"log/slog"
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

// OpenEngines opens every ensemble, by its name. The lifecycle closes them.
func OpenEngines(c ScoringConfig, reg prometheus.Registerer, log *slog.Logger, life *Lifecycle,
) (map[string]*scoring.Engine, error) {
	engines := map[string]*scoring.Engine{}
	for _, path := range c.Ensembles {
		options := c.Options
		options.Registerer, options.Log = reg, log
		life.doing.Store("start of ensemble " + path)
		verified, err := ensemble.Open(path)
		if err != nil {
			return nil, err
		}
		name := verified.Name
		if engines[name] != nil {
			return nil, settings.Errorf("scoring.ensembles: %s and another ensemble are both named %s", path, name)
		}
		engines[name], err = scoring.New(verified, options)
		life.doing.Store("start")
		if err != nil {
			return nil, err
		}
		life.OnStop("ensemble "+name, engines[name].Close)
	}
	return engines, nil
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
	for name, engine := range engines {
		digest, profile := engine.Ensemble().Digest, engine.Profile().Settings()
		series := schema.Series{Model: name, EnsembleDigest: digest, Settings: profile}
		if !slices.ContainsFunc(list, func(t schema.Threshold) bool { return t.Series() == series }) {
			advice := "decuwatch thresholds set --help"
			if len(ReferenceThresholds(engine.Ensemble())) > 0 {
				advice = "decuwatch thresholds from-reference " + engine.Ensemble().Path + " --apply"
			}
			log.Warn("no threshold applies to this ensemble and its settings: scores are stored, but raise no alert",
				"model", name, "ensemble", digest, "settings", profile, "run", advice)
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

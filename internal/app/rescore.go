package app

import (
	"log/slog"
	"slices"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/monitor/rescore"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// newRescores returns the worker that scores stored events again, on the live engines and on the shadows. A shadow
// shares the device with the live engines, so it stands back while one of them is busy.
func newRescores(js jetstream.JetStream, c Config, live, shadows map[string]*scoring.Engine, store *postgres.Store,
	thresholds *alerts.Thresholds, latents monitor.Latents, reg prometheus.Registerer, log *slog.Logger,
) (*rescore.Worker, error) {
	var targets []rescore.Target
	models, err := Models(live, c.Scoring)
	if err != nil {
		return nil, err
	}
	for name, model := range withLatents(models, latents) {
		targets = append(targets, rescore.Target{Model: model, Series: seriesOf(live[name])})
	}
	busy := func() bool {
		return slices.ContainsFunc(everyEngine(live, nil), (*scoring.Engine).Busy)
	}
	if models, err = Models(shadows, c.Scoring); err != nil {
		return nil, err
	}
	for name, model := range withLatents(models, latents) {
		targets = append(targets, rescore.Target{
			Model: model, Series: seriesOf(shadows[name]), Shadow: true, Share: c.Scoring.ShadowShare,
			Busy: busy, BusyShare: c.Scoring.BackgroundShare,
		})
	}
	c.Rescore.Replicas = c.Stream.Replicas
	return rescore.NewWorker(js, rescores{store}, thresholds, targets, c.Rescore, reg, log)
}

// seriesOf returns the series of the scores that an engine makes with its fixed profile.
func seriesOf(e *scoring.Engine) schema.Series {
	return schema.Series{
		Model: e.Ensemble().Name, EnsembleDigest: e.Ensemble().Digest, Settings: e.Profile().Settings(),
	}
}

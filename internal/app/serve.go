// Package app wires the monitor: configuration, lifecycle, health, and the one function that runs everything.
package app

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"runtime"
	"slices"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/patrol"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/monitor/budget"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// Serving describes a running monitor.
type Serving struct {
	Metrics string // address of metrics and health
	Review  string // address of the review page; "" if there is none
	Engines map[string]*scoring.Engine
}

// Options are what [Serve] needs beside its settings.
type Options struct {
	Log               *slog.Logger
	Version, Revision string        // of the program, for its metrics
	Started           func(Serving) // called once, when everything runs. May be nil
}

// Serve wires the monitor and runs it until ctx ends or a part of it fails.
func Serve(ctx context.Context, c Config, o Options) (err error) {
	log := o.Log
	if err := c.Check(); err != nil {
		return err
	}
	life, ctx := NewLifecycle(ctx, log)
	life.Bound(c.Consumers.DrainTimeout + exitMargin)
	defer life.End(&err)

	// Metrics and health start first and stop last.
	reg := NewRegistry(o.Version, o.Revision)
	health := newHealth(reg)
	listener, err := c.Metrics.Listen("metrics", c.Metrics.Address)
	if err != nil {
		return err
	}
	life.Run("metrics", func(ctx context.Context) error {
		return ServeHTTP(ctx, listener, observability(reg, health, c.Metrics.Pprof))
	})
	tracer, flush, err := newTracer(ctx, c.Tracing)
	if err != nil {
		return err
	}
	life.OnStop("tracing", flush)
	evaluations, flush, err := newEvaluations(ctx, c.Tracing, reg)
	if err != nil {
		return err
	}
	life.OnStop("evaluations", flush)

	// Ensembles.
	engines, err := OpenEngines(c.Scoring, reg, log, life)
	if err != nil {
		return err
	}
	shadows, err := openShadows(c.Scoring, engines, log, life)
	if err != nil {
		return err
	}
	names, every := slices.Sorted(maps.Keys(engines)), everyEngine(engines, shadows)

	// NATS and Postgres.
	nc, err := c.NATS.Connect("serve", true, log)
	if err != nil {
		return err
	}
	life.OnStop("NATS", func() error { nc.Close(); return nil })
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	if c.Alerts.Link == "" {
		c.Alerts.Link = ReviewLink(c.Review.URL)
	}
	stream, sinks, err := c.Alerts.Sinks(js)
	if err != nil {
		return err
	}
	var sinkNames []schema.Sink
	for _, s := range sinks {
		sinkNames = append(sinkNames, s.Name())
	}
	away := func(err error) { health.note(partPostgres, err) }
	c.Postgres.Volume, c.Postgres.Maintenance = c.Volume, c.Retention
	store, err := openStore(ctx, c.Postgres, log, away, sinkNames...)
	if err != nil {
		return life.Ended(err)
	}
	life.OnStop("Postgres", func() error { store.Close(); return nil })
	ready := newReadiness(reg, c.Metrics.ClockTolerance, log)
	ready.engines, ready.shadows, ready.store = engines, shadows, store
	ready.nc, ready.js, ready.events, ready.alerts = nc, js, c.Stream.Name, stream
	life.OnStop("registration", ready.leave)
	ready.watch(health)
	life.Run("health", health.run)
	_, err = whenBack(ctx, log, away, func() (struct{}, error) {
		return struct{}{}, errors.Join(store.EnsurePartitions(ctx, c.Retention.Ahead),
			store.AddClassData(ctx, classData(every)))
	})
	if err != nil {
		return life.Ended(err)
	}
	life.Run("maintenance", func(ctx context.Context) error { store.Maintain(ctx); return nil })

	// Thresholds and the patrol.
	counts := alerts.NewMetrics(reg, names, sinkNames)
	thresholds, err := whenBack(ctx, log, away, func() (*alerts.Thresholds, error) {
		return alerts.NewThresholds(ctx, store, log, counts)
	})
	if err != nil {
		return life.Ended(err)
	}
	life.Run("thresholds", thresholds.Run)
	warnWithoutThresholds(ctx, store, engines, log)
	patrol, err := whenBack(ctx, log, away, func() (*patrol.Patrol, error) {
		return newPatrol(ctx, c.Patrol, engines, store, reg, log)
	})
	if err != nil {
		return life.Ended(err)
	}
	life.Run("patrol", patrol.Run)

	// Alerts leave.
	room := func(err error) error { return ExplainRoom(ctx, js, c.Stream, c.Alerts, err) }
	if !nc.IsConnected() {
		life.Run("stream of alerts", func(ctx context.Context) error {
			return room(ensureOnce(ctx, nc, "stream of alerts", log, stream.Ensure))
		})
	} else if err := stream.Ensure(ctx); err != nil {
		return room(err)
	}
	relay, err := alerts.NewRelay(store, alerts.RelayConfig{Logger: log, Metrics: counts, Tracer: tracer}, sinks...)
	if err != nil {
		return err
	}
	life.Run("relay", relay.Run)

	// The review page.
	page, err := servePage(c.Review, store, reg, log, life)
	if err != nil {
		return err
	}

	// Events come in.
	latents := consumers.NewLatents(js, c.Latents)
	life.Run("buckets of latents", func(ctx context.Context) error {
		return room(ensureOnce(ctx, nc, "buckets of latents", log, func(ctx context.Context) error {
			return consumers.EnsureLatents(ctx, js, c.Latents, c.Stream.Replicas, names...)
		}))
	})
	models, err := Models(engines, c.Scoring)
	if err != nil {
		return err
	}
	budgets, err := budget.New(c.Budget, store, budget.Options{
		Models: names, MaxAge: c.Stream.MaxAge, Registerer: reg, Log: log,
	})
	if err != nil {
		return err
	}
	life.Run("budgets", budgets.Run)
	m, err := monitor.New(withLatents(models, latents), thresholds, Recorder{store}, monitor.Config{
		MaxClassSeries: c.Metrics.MaxClassSeries, SampleShare: c.Review.Share,
		Sampling: c.Sampling, Budget: budgets, Registerer: reg, Tracer: tracer, Evaluations: evaluations, Log: log,
	})
	if err != nil {
		return err
	}
	consuming := c.Consumers
	consuming.Models, consuming.Stream, consuming.Ledger = names, c.Stream, store
	consuming.Healthy, consuming.Tries = healthy(store, engines), tries{store}
	consuming.Logger, consuming.Metrics, consuming.Tracer = log, consumers.NewMetrics(reg, names), tracer
	consuming.Backlog = func(model string, b consumers.Backlog) { budgets.Observe(model, budget.Backlog(b)) }
	runner, err := consumers.New(js, m, consuming)
	if err != nil {
		return err
	}
	health.set(partStream, func(ctx context.Context) error {
		return errors.Join(runner.Settings(), stream.Check(ctx))
	})
	health.set(partPulling, func(ctx context.Context) error {
		return errors.Join(runner.Pulling(), ready.paused(ctx, names))
	})
	life.Run("consumers", func(ctx context.Context) error { return room(runner.Run(ctx)) })

	// Behind live work.
	rescores, err := newRescores(js, c, engines, shadows, store, thresholds, latents, reg, log)
	if err != nil {
		return err
	}
	life.Run("re-scores", rescores.Run)
	c.Review.Latents = latents
	evidence, err := newEvidence(c.Review, store, every, reg, log)
	if err != nil {
		return err
	}
	if evidence != nil {
		life.Run("evidence", evidence.Run)
	}

	log.Info("serving", "models", names, "nats", settings.Redact(c.NATS.URL), "review", page,
		"metrics", c.Metrics.scheme()+"://"+listener.Addr().String()+"/metrics", "thresholds", thresholds.Table().Len())
	if o.Started != nil {
		o.Started(Serving{Metrics: listener.Addr().String(), Review: page, Engines: engines})
	}
	if err := life.Wait(); err != nil {
		return err
	}
	log.Info("stopping: finishing what is in flight", "at_most", c.Consumers.DrainTimeout)
	return nil
}

// NewRegistry returns a registry with the process's own metrics.
func NewRegistry(version, revision string) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	promauto.With(reg).NewGauge(prometheus.GaugeOpts{
		Name: "decuwatch_build_info", Help: "1; the labels say what was built.",
		ConstLabels: prometheus.Labels{"version": version, "revision": revision, "goversion": runtime.Version()},
	}).Set(1)
	return reg
}

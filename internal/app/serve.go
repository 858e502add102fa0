// Package app wires the monitor: configuration, lifecycle, health, and the one function that runs everything.
package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// Serving is what a running monitor tells about itself.
type Serving struct {
	Metrics string // address of the mux of metrics and health
	Review  string // address of the review page, or ""
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

	// Metrics and health come first and go last.
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

	// What is scored with.
	engines, err := OpenEngines(c.Scoring, reg, log, life)
	if err != nil {
		return err
	}
	life.doing.Store("start")
	names := make([]string, 0, len(engines))
	for name := range engines {
		names = append(names, name)
	}
	slices.Sort(names)

	// What is read from and written to.
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
	sinkNames := make([]schema.Sink, len(sinks))
	for i, s := range sinks {
		sinkNames[i] = s.Name()
	}
	if c.Postgres.Migrate {
		err := postgres.Migrate(ctx, c.Postgres.URL)
		if errors.Is(err, postgres.ErrNewer) { // after a rollback to this program; newer tables serve it too
			log.Warn("the tables are left as they are", "err", err)
		} else if err != nil {
			return err
		}
	}
	c.Postgres.Volume, c.Postgres.Maintenance = c.Volume, c.Retention
	store, err := c.Postgres.Open(ctx, log, sinkNames...)
	if err != nil {
		return err
	}
	life.OnStop("Postgres", func() error { store.Close(); return nil })
	ready := newReadiness(reg, c.Metrics.ClockTolerance, log)
	ready.engines, ready.nc, ready.js, ready.events, ready.alerts, ready.store = engines, nc, js, c.Stream.Name, stream, store
	life.OnStop("registration", ready.leave)
	ready.watch(health)
	life.Run("health", health.run)
	if err := store.EnsurePartitions(ctx, c.Retention.Ahead); err != nil {
		return err
	}
	life.Run("maintenance", func(ctx context.Context) error { store.Maintain(ctx); return nil })

	// What is decided by.
	counts := alerts.NewMetrics(reg, names, sinkNames)
	thresholds, err := alerts.NewThresholds(ctx, store, log, counts)
	if err != nil {
		return err
	}
	life.Run("thresholds", thresholds.Run)
	warnWithoutThresholds(ctx, store, engines, log)
	patrol, err := newPatrol(ctx, c.Patrol, engines, store, reg, log)
	if err != nil {
		return err
	}
	life.Run("patrol", patrol.Run)

	// The alerts' way out.
	room := func(err error) error { return ExplainRoom(ctx, js, c.Stream, c.Alerts, err) }
	if nc.IsConnected() {
		if err := stream.Ensure(ctx); err != nil {
			return room(err)
		}
	} else {
		life.Run("stream of alerts", func(ctx context.Context) error { return room(ensureAlerts(ctx, nc, stream, log)) })
	}
	relay, err := alerts.NewRelay(store, alerts.RelayConfig{Logger: log, Metrics: counts, Tracer: tracer}, sinks...)
	if err != nil {
		return err
	}
	life.Run("relay", relay.Run)

	// The events' way in.
	m, err := monitor.New(Models(engines, c.Scoring), thresholds, Recorder{store}, monitor.Config{
		MaxClassSeries: c.Metrics.MaxClassSeries, SampleShare: c.Review.Share, Registerer: reg, Tracer: tracer, Log: log,
	})
	if err != nil {
		return err
	}
	consuming := c.Consumers
	consuming.Models, consuming.Stream = names, c.Stream
	consuming.Healthy, consuming.Tries, consuming.Ledger = healthy(store, engines), tries{store}, store
	consuming.Logger, consuming.Metrics, consuming.Tracer = log, consumers.NewMetrics(reg, names), tracer
	runner, err := consumers.New(js, m, consuming)
	if err != nil {
		return err
	}
	health.set(partStream, func(ctx context.Context) error { return errors.Join(runner.Settings(), stream.Check(ctx)) })
	health.set(partPulling, func(ctx context.Context) error {
		return errors.Join(runner.Pulling(), ready.paused(ctx, names))
	})
	life.Run("consumers", func(ctx context.Context) error { return room(runner.Run(ctx)) })

	// What people look at.
	page, err := serveReview(c.Review, store, engines, reg, log, life)
	if err != nil {
		return err
	}

	log.Info("serving", "models", names, "nats", settings.Redact(c.NATS.URL), "metrics", c.Metrics.scheme()+"://"+listener.Addr().String()+"/metrics", "thresholds", thresholds.Table().Len(), "review", page)
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
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "decuwatch_build_info", Help: "1; the labels say what was built.",
		ConstLabels: prometheus.Labels{"version": version, "revision": revision, "goversion": runtime.Version()},
	}, func() float64 { return 1 }))
	return reg
}

// OpenEngines opens every ensemble, by its name. The life closes them.
func OpenEngines(c ScoringConfig, reg prometheus.Registerer, log *slog.Logger, life *Lifecycle) (map[string]*scoring.Engine, error) {
	engines := map[string]*scoring.Engine{}
	for _, path := range c.Ensembles {
		options := c.Options
		options.Ensemble, options.Registerer, options.Log = path, reg, log
		life.doing.Store("start of ensemble " + path)
		engine, err := scoring.Open(options)
		if err != nil {
			return nil, err
		}
		name := engine.Ensemble().Name
		life.OnStop("ensemble "+name, engine.Close)
		if engines[name] != nil {
			return nil, settings.Errorf("scoring.ensembles: %s and another ensemble are both named %s", path, name)
		}
		engines[name] = engine
	}
	return engines, nil
}

// Models returns how the events of each model are scored.
func Models(engines map[string]*scoring.Engine, c ScoringConfig) map[string]monitor.Model {
	list := map[string]monitor.Model{}
	for name, engine := range engines {
		list[name] = monitor.Model{
			Scorer: engine, Classes: engine.Ensemble().Labels(), Profile: engine.Profile(),
			Diffusion:   engine.Ensemble().Diffusion,
			AsRequested: c.Profile == scoring.ProfileAsRequested, SkipUnreproducible: c.Unreproducible == "skip",
		}
	}
	return list
}

// recent is how long a good run of a session proves that it works.
const recent = 10 * time.Second

// healthy reports whether verdicts can be committed and requests be scored. It is asked after a failure only.
func healthy(store *postgres.Store, engines map[string]*scoring.Engine) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := store.Ping(ctx); err != nil {
			return fmt.Errorf("postgres: %w", err)
		}
		for name, engine := range engines {
			if err := engine.Check(ctx, recent); err != nil {
				return fmt.Errorf("ensemble %s: %w", name, err)
			}
		}
		return nil
	}
}

// warnWithoutThresholds says at the start which models raise no alert.
func warnWithoutThresholds(ctx context.Context, store *postgres.Store, engines map[string]*scoring.Engine, log *slog.Logger) {
	list, err := store.Thresholds(ctx)
	if err != nil {
		return // they were read a moment ago; the thresholds' own loop reports it
	}
	for name, engine := range engines {
		applies := func(t schema.Threshold) bool {
			return t.Series() == schema.Series{Model: name, EnsembleDigest: engine.Ensemble().Digest, Settings: engine.Profile().Settings()}
		}
		if !slices.ContainsFunc(list, applies) {
			log.Warn("no threshold applies to this ensemble and its settings: scores are stored, but raise no alert", "model", name,
				"ensemble", engine.Ensemble().Digest, "settings", engine.Profile().Settings(), "see", "decuwatch thresholds set --help")
		}
	}
}

// Recorder gives the monitor the store in the form it asks for.
type Recorder struct{ *postgres.Store }

func (r Recorder) Recorded(ctx context.Context, ev schema.Event, d schema.Delivery) (bool, error) {
	known, err := r.Known(ctx, ev.Identity(), d)
	if err == nil && !known {
		err = r.CheckAge(ev.Time, d.Time)
	}
	return known, unavailable(err)
}

func (r Recorder) Record(ctx context.Context, v schema.Verdict) (bool, error) {
	recorded, err := r.Store.Record(ctx, v)
	return recorded.First, unavailable(err)
}

// tries gives the consumers the store in the form they ask for.
type tries struct{ *postgres.Store }

func (t tries) Try(ctx context.Context, d schema.Delivery, add schema.Tries) (schema.Tries, error) {
	sum, err := t.Store.Try(ctx, d, add)
	return sum, unavailable(err)
}

// unavailable marks an error that is not about the verdict: the message is kept until the database is well again.
func unavailable(err error) error {
	if err == nil || postgres.Refused(err) {
		return err
	}
	return consumers.Unavailable(err)
}

package app

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/monitor/canary"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Canary are the settings of a process that publishes canaries.
type Canary struct {
	Ensembles []string `name:"scoring.ensembles" short:"e" required:"" placeholder:"PATH" help:"Directories or manifests."`

	Every    time.Duration `default:"5m" help:"Time between two canaries of a model."`
	Deadline time.Duration `default:"1m" help:"Time within which an alert must fire."`
	Once     bool          `help:"Publish one canary of each model and wait for its alert; exit code 3 if it is missed."`
	Listen   string        `default:"127.0.0.1:9465" help:"Address of /metrics, or none; port 0 is any free port."`

	NATS NATSConfig `embed:"" prefix:"nats." group:"NATS"`

	Stream consumers.StreamConfig `embed:"" prefix:"stream." group:"Stream of events" hides:"keep-settled,check-interval"`

	Alerts alerts.Config `embed:"" prefix:"alerts." group:"Alerts" hides:"stream,max-age,max-bytes,replicas,link"`

	Postgres PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

// WatchCanaries publishes canaries until ctx ends. With Once, it reports each canary and ends when all are decided; the
// error is then canary.ErrMissed if no alert fired on one of them.
func WatchCanaries(ctx context.Context, c Canary, report func(postgres.Canary), o Options) (err error) {
	var manifests []*ensemble.Manifest
	for _, path := range c.Ensembles {
		e, err := ensemble.Open(path)
		if err != nil {
			return err
		}
		manifests = append(manifests, &e.Manifest)
	}
	life, ctx := NewLifecycle(ctx, o.Log)
	defer life.End(&err)
	nc, err := c.NATS.Connect("canary", !c.Once, o.Log)
	if err != nil {
		return err
	}
	life.OnStop("NATS", func() error { nc.Close(); return nil })
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	_, sinks, err := c.Alerts.Sinks(js)
	if err != nil {
		return err
	}
	var names []schema.Sink
	for _, sink := range sinks {
		names = append(names, sink.Name())
	}
	reg := NewRegistry(o.Version, o.Revision)
	if !c.Once {
		if err := c.serveMetrics(reg, life, o.Log); err != nil {
			return err
		}
	}
	store, err := c.openStore(ctx, o.Log, names)
	if err != nil {
		return life.Ended(err)
	}
	life.OnStop("Postgres", func() error { store.Close(); return nil })

	watchdog, err := canary.New(store, c.publisher(js), manifests,
		canary.Config{Every: c.Every, Deadline: c.Deadline, Registerer: reg, Log: o.Log})
	if err != nil {
		return err
	}
	if c.Once {
		return watchdog.Once(ctx, report)
	}
	o.Log.Info("publishing canaries", "every", c.Every, "deadline", c.Deadline)
	life.Run("canary", watchdog.Run)
	return life.Wait()
}

// serveMetrics serves /metrics, and /healthz, unless they are switched off.
func (c Canary) serveMetrics(reg *prometheus.Registry, life *Lifecycle, log *slog.Logger) error {
	if c.Listen == NoPage {
		return nil
	}
	listener, err := Listen("--listen", c.Listen)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	life.Run("metrics", func(ctx context.Context) error { return ServeHTTP(ctx, listener, mux) })
	log.Info("serving metrics", "metrics", "http://"+listener.Addr().String()+"/metrics")
	return nil
}

// openStore opens the store, and waits while Postgres is away if the process keeps running.
func (c Canary) openStore(ctx context.Context, log *slog.Logger, sinks []schema.Sink) (*postgres.Store, error) {
	if c.Once {
		return c.Postgres.Open(ctx, log, sinks...)
	}
	return openStore(ctx, c.Postgres, log, func(error) {}, sinks...)
}

// publisher returns a function that stores an event in the stream, which it creates if it does not exist.
func (c Canary) publisher(js jetstream.JetStream) func(context.Context, schema.Event) error {
	return func(ctx context.Context, ev schema.Event) error {
		ctx, cancel := context.WithTimeout(ctx, c.Deadline)
		defer cancel()
		if err := EnsureEvents(ctx, js, c.Stream, c.Alerts); err != nil {
			return err
		}
		_, err := schema.Publish(ctx, js, ev)
		return err
	}
}

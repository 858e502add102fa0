package app

import (
	"context"
	"net/http"
	"time"

	"github.com/nats-io/nats.go/jetstream"
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
	Ensembles []string
	Every     time.Duration         // between two canaries of a model
	Deadline  time.Duration         // within which an alert must fire
	Listen    string                // address of /metrics, or NoPage
	Once      func(postgres.Canary) // if set, publish one canary of each model, and report to it

	NATS     NATSConfig
	Stream   consumers.StreamConfig
	Alerts   alerts.Config
	Postgres PostgresConfig
}

// WatchCanaries publishes canaries until ctx ends. With Once, it ends when each canary is decided; the error is then
// canary.ErrMissed if no alert fired on one of them.
func WatchCanaries(ctx context.Context, c Canary, o Options) (err error) {
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
	nc, err := c.NATS.Connect("canary", c.Once == nil, o.Log)
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
	store, err := c.Postgres.Open(ctx, o.Log, names...)
	if err != nil {
		return err
	}
	life.OnStop("Postgres", func() error { store.Close(); return nil })

	reg := NewRegistry(o.Version, o.Revision)
	watchdog, err := canary.New(store, c.publisher(js), manifests,
		canary.Config{Every: c.Every, Deadline: c.Deadline, Registerer: reg, Log: o.Log})
	if err != nil {
		return err
	}
	if c.Once != nil {
		return watchdog.Once(ctx, c.Once)
	}
	if c.Listen != NoPage {
		listener, err := Listen("--listen", c.Listen)
		if err != nil {
			return err
		}
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true}))
		life.Run("metrics", func(ctx context.Context) error { return ServeHTTP(ctx, listener, mux) })
		o.Log.Info("publishing canaries", "every", c.Every, "deadline", c.Deadline,
			"metrics", "http://"+listener.Addr().String()+"/metrics")
	}
	life.Run("canary", watchdog.Run)
	return life.Wait()
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

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/canary"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type canaryCmd struct {
	Ensembles []string `name:"scoring.ensembles" short:"e" required:"" placeholder:"PATH" help:"Directories or manifests."`

	Every    time.Duration `default:"5m" help:"Time between two canaries of a model."`
	Deadline time.Duration `default:"1m" help:"Time within which an alert must fire."`
	Once     bool          `help:"Publish one canary of each model and wait for its alert; exit code 3 if it is missed."`
	Listen   string        `default:"127.0.0.1:9465" help:"Address of /metrics, or none; port 0 is any free port."`

	NATS     app.NATSConfig         `embed:"" prefix:"nats." group:"NATS"`
	Stream   consumers.StreamConfig `embed:"" prefix:"stream." group:"Stream of events"`
	Alerts   alerts.Config          `embed:"" prefix:"alerts." group:"Alerts"`
	Postgres app.PostgresConfig     `embed:"" prefix:"postgres." group:"Postgres"`
}

func (canaryCmd) Help() string {
	return `Publishes events of under-trained classes, those with the fewest training images in the manifest, and expects
an alert on each. If no alert fires in time, it raises an alert of kind canary_missed and counts it in a metric. So you
notice if the monitor is silent because it is broken. Canaries carry the label decuwatch.canary and enter neither
review nor statistics.

Examples:

  decuwatch canary -e ensembles/fashion-mnist
  decuwatch canary -e ensembles/fashion-mnist --once --deadline 30s`
}

func (c *canaryCmd) Run(ctx context.Context, s *streams, log *slog.Logger) (err error) {
	if c.Every <= 0 || c.Deadline <= 0 {
		return usage("--every and --deadline must be positive")
	}
	manifests, err := openManifests(c.Ensembles)
	if err != nil {
		return err
	}
	life, ctx := app.NewLifecycle(ctx, log)
	defer life.End(&err)
	nc, err := c.NATS.Connect("canary", !c.Once, log)
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
	names := make([]schema.Sink, len(sinks))
	for i, sink := range sinks {
		names[i] = sink.Name()
	}
	store, err := c.Postgres.Open(ctx, log, names...)
	if err != nil {
		return err
	}
	life.OnStop("Postgres", func() error { store.Close(); return nil })

	reg := app.NewRegistry(built())
	watchdog, err := canary.New(store, c.publisher(js), manifests,
		canary.Config{Every: c.Every, Deadline: c.Deadline, Registerer: reg, Log: log})
	if err != nil {
		return err
	}
	if c.Once {
		return once(ctx, s, watchdog)
	}
	if c.Listen != app.NoPage {
		listener, err := app.Listen("--listen", c.Listen)
		if err != nil {
			return err
		}
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true}))
		life.Run("metrics", func(ctx context.Context) error { return app.ServeHTTP(ctx, listener, mux) })
		log.Info("publishing canaries", "every", c.Every, "deadline", c.Deadline,
			"metrics", "http://"+listener.Addr().String()+"/metrics")
	}
	life.Run("canary", watchdog.Run)
	return life.Wait()
}

func openManifests(paths []string) ([]*ensemble.Manifest, error) {
	var list []*ensemble.Manifest
	for _, path := range paths {
		e, err := ensemble.Open(path)
		if err != nil {
			return nil, err
		}
		list = append(list, &e.Manifest)
	}
	return list, nil
}

// publisher returns a function that stores an event in the stream, which it creates if it does not exist.
func (c *canaryCmd) publisher(js jetstream.JetStream) func(context.Context, schema.Event) error {
	return func(ctx context.Context, ev schema.Event) error {
		ctx, cancel := context.WithTimeout(ctx, c.Deadline)
		defer cancel()
		if err := app.EnsureEvents(ctx, js, c.Stream, c.Alerts); err != nil {
			return err
		}
		_, err := schema.Publish(ctx, js, ev)
		return err
	}
}

func once(ctx context.Context, s *streams, w *canary.Watchdog) error {
	err := w.Once(ctx, func(c postgres.Canary) {
		if c.Outcome == "" {
			fmt.Fprintf(s.out, "published %s, class %s of %s\n", c.EventID, printable(c.ClassLabel), c.Model)
		} else {
			fmt.Fprintf(s.out, "%s is %s\n", c.EventID, c.Outcome)
		}
	})
	if errors.Is(err, canary.ErrMissed) {
		return errDifference
	}
	return err
}

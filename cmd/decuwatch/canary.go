package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/canary"
	"github.com/decuwatch/decuwatch/schema/postgres"
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

func (c *canaryCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Every <= 0 || c.Deadline <= 0 {
		return usage("--every and --deadline must be positive")
	}
	settings := app.Canary{
		Ensembles: c.Ensembles, Every: c.Every, Deadline: c.Deadline, Listen: c.Listen,
		NATS: c.NATS, Stream: c.Stream, Alerts: c.Alerts, Postgres: c.Postgres,
	}
	if c.Once {
		settings.Once = func(k postgres.Canary) {
			if k.Outcome == "" {
				fmt.Fprintf(s.out, "published %s, class %s of %s\n", k.EventID, printable(k.ClassLabel), k.Model)
			} else {
				fmt.Fprintf(s.out, "%s is %s\n", k.EventID, k.Outcome)
			}
		}
	}
	version, revision := built()
	err := app.WatchCanaries(ctx, settings, app.Options{Log: log, Version: version, Revision: revision})
	if errors.Is(err, canary.ErrMissed) {
		return errDifference
	}
	return err
}

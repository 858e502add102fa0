package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor/canary"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type canaryCmd struct {
	app.Canary `embed:""`
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
	if c.Listen != app.NoPage {
		if err := settings.HostPort("--listen", c.Listen); err != nil {
			return err
		}
	}
	report := func(k postgres.Canary) {
		if k.Outcome == "" {
			fmt.Fprintf(s.out, "published %s, class %s of %s\n", k.EventID, printable(k.ClassLabel), k.Model)
		} else {
			fmt.Fprintf(s.out, "%s is %s\n", k.EventID, k.Outcome)
		}
	}
	version, revision := built()
	err := app.WatchCanaries(ctx, c.Canary, report, app.Options{Log: log, Version: version, Revision: revision})
	if errors.Is(err, canary.ErrMissed) {
		return errDifference
	}
	return err
}

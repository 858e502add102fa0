package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/redeliver"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type republishCmd struct {
	Apply    bool               `help:"Publish them again instead of only listing them."`
	Yes      bool               `hidden:"" help:"The earlier name of --apply."`
	NATS     app.NATSConfig     `embed:"" prefix:"nats." group:"NATS"`
	Alerts   alerts.Config      `embed:"" prefix:"alerts." group:"Alerts" shows:"stream,max-age"`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (republishCmd) Help() string {
	return `Finds alerts and reviewers' verdicts that were published but are not in the stream, as after a loss of NATS,
and prints their ids. With --apply, a running worker publishes them again under the same ids. Messages older than the
stream's maximum age are left out. Exit code 3 if some are missing and --apply was not given.

Examples:

  decuwatch republish
  decuwatch republish --apply`
}

func (c *republishCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return app.WithServers(ctx, "republish", c.NATS, c.Postgres, log, func(js jetstream.JetStream, store *postgres.Store,
	) error {
		missing, err := redeliver.Unpublished(ctx, js, store, c.Alerts.Stream, c.Alerts.MaxAge)
		if err != nil {
			return err
		}
		for _, id := range missing {
			fmt.Fprintln(s.out, printable(id))
		}
		switch {
		case len(missing) == 0:
			fmt.Fprintf(s.out, "nothing is missing from the stream %s\n", c.Alerts.Stream)
			return nil
		case !c.Apply && !c.Yes:
			fmt.Fprintf(s.out, "%d messages are missing from the stream %s; publish them again with --apply\n",
				len(missing), c.Alerts.Stream)
			return errDifference
		}
		if err := redeliver.Republish(ctx, store, missing); err != nil {
			return err
		}
		_, err = fmt.Fprintf(s.out, "%d messages are owed to the stream %s again\n", len(missing), c.Alerts.Stream)
		return err
	})
}

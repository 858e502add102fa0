package main

import (
	"context"
	"log/slog"
	"math"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/reconcile"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type reconcileCmd struct {
	From   uint64                 `placeholder:"SEQUENCE" help:"Report losses from this message on. Defaults to 1."`
	JSON   bool                   `name:"json" help:"Print the counts as JSON."`
	NATS   app.NATSConfig         `embed:"" prefix:"nats." group:"NATS"`
	Stream consumers.StreamConfig `embed:"" prefix:"stream." group:"Stream of events" shows:"name"`
	Alerts alerts.Config          `embed:"" prefix:"alerts." group:"Alerts" shows:"stream"`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (reconcileCmd) Help() string {
	return `Checks that every message of the stream of events has exactly one verdict in Postgres, and that every alert is
in both places. Messages that have left the stream must have a verdict, too. An event that a worker will take is
waiting, which is no difference. An event that nobody takes is a difference. Exit code 0 if both sides agree, 3 if they
do not.

Example:

  decuwatch reconcile`
}

func (c *reconcileCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return app.WithServers(ctx, "reconcile", c.NATS, c.Postgres, log,
		func(js jetstream.JetStream, store *postgres.Store) error { return c.reconcile(ctx, s, js, store) })
}

func (c *reconcileCmd) reconcile(ctx context.Context, s *streams, js jetstream.JetStream, store *postgres.Store) error {
	bar := progress(s, 0, "reconciling")
	r, err := reconcile.Run(ctx, reconcile.Options{
		JetStream: js, Store: store, Events: c.Stream.Name, Alerts: c.Alerts.Stream, From: c.From,
		Progress: func(total uint64, more int) {
			bar.ChangeMax64(int64(min(total, math.MaxInt64))) //nolint:gosec // bounded
			_ = bar.Add(more)                                 // it only draws
		},
	})
	_ = bar.Exit()
	if err != nil {
		return err
	}
	if c.JSON {
		err = writeJSON(s.out, r)
	} else {
		err = r.Print(s.out)
	}
	if err == nil && !r.Agrees() {
		err = errDifference
	}
	return err
}

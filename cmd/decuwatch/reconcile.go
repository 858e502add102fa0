package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"text/tabwriter"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/reconcile"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type reconcileCmd struct {
	From     uint64                 `placeholder:"SEQUENCE" help:"Sequence number from which losses are reported; messages lost before it are known. Defaults to 1."`
	JSON     bool                   `name:"json" help:"Print the counts as JSON."`
	NATS     app.NATSConfig         `embed:"" prefix:"nats." group:"NATS"`
	Stream   consumers.StreamConfig `embed:"" prefix:"stream." group:"Stream of events"`
	Alerts   alerts.Config          `embed:"" prefix:"alerts." group:"Alerts"`
	Postgres app.PostgresConfig     `embed:"" prefix:"postgres." group:"Postgres"`
}

func (reconcileCmd) Help() string {
	return `Reads every message of the stream of events and looks for its one verdict in Postgres, and every alert in both places. Sequence numbers that have left the stream must have a verdict, too. An event that a worker will take waits, and is no difference; one that nobody takes is. Exit code 0 if both sides agree, 3 if they do not.

Example:

  decuwatch reconcile`
}

func (c *reconcileCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return app.WithServers(ctx, "reconcile", c.NATS, c.Postgres, log, func(js jetstream.JetStream, store *postgres.Store) error {
		return c.reconcile(ctx, s, js, store)
	})
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
		err = printReport(s, r)
	}
	if err == nil && !r.Agrees() {
		err = errDifference
	}
	return err
}

func printReport(s *streams, r *reconcile.Report) error {
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%d\t messages\t\n", r.Messages)
	for _, line := range []struct {
		n    int
		what string
	}{
		{r.Scores, "scores"}, {r.Skips, "skips"}, {r.DeadLetters, "dead letters"}, {r.Repeats, "repeats of an event, whose first verdict stands"},
		{r.Waiting, "waiting for a verdict"}, {r.Orphaned, "ORPHANED: nobody takes them"}, {r.Missing, "acknowledged WITHOUT a verdict"},
		{r.Several, "with SEVERAL verdicts"}, {r.Lost, "LOST: gone from the stream without a verdict"},
	} {
		fmt.Fprintf(w, "%d\t %s\t\n", line.n, line.what)
	}
	return errors.Join(w.Flush(), printAlerts(s, r))
}

func printAlerts(s *streams, r *reconcile.Report) error {
	fmt.Fprintf(s.out, "%d alerts, %d published, %d held back, %d owed, %d lost, %d unknown\n", r.Alerts, r.Published, r.HeldBack, r.OwedAlerts, r.LostAlerts, r.UnknownAlerts)
	for _, d := range r.Differences {
		fmt.Fprintf(s.out, "  %s\n", d)
	}
	verdict := "Both sides agree."
	if !r.Agrees() {
		verdict = "The two sides do NOT agree."
	}
	_, err := fmt.Fprintln(s.out, verdict)
	return err
}

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"text/tabwriter"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/replay"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type replayCmd struct {
	ID       string             `arg:"" help:"Id of the event."`
	Source   string             `placeholder:"SOURCE" help:"Source of the event; required if several sources used the id."`
	Model    string             `placeholder:"NAME" help:"Model of the event; required if several models used the id."`
	JSON     bool               `name:"json" help:"Print the comparison as JSON."`
	Scoring  app.ScoringConfig  `embed:"" prefix:"scoring." group:"Scoring"`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (replayCmd) Help() string {
	return `Reads a stored score, reruns its request from the receipt alone (seed, noise, class, steps, guidance, eta, ` +
		`branch steps, estimators, carrying component) through the ensemble of the same digest, and compares within the ` +
		`tolerance of docs/method.md. Exit code 0 if the two agree, 3 if they do not.

Example:

  decuwatch replay -e ensembles/fashion-mnist 0198c0de-7b1a-7000-8000-5f0d3c1b2a49`
}

func (c *replayCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		stored, err := store.ScoreByID(ctx, schema.Identity{Source: c.Source, ID: c.ID, Model: c.Model})
		if errors.Is(err, postgres.ErrNotFound) {
			return fmt.Errorf("no score is stored: %w", err)
		}
		if err != nil {
			return err
		}
		return c.compare(ctx, s, log, stored)
	})
}

func (c *replayCmd) compare(ctx context.Context, s *streams, log *slog.Logger, stored *schema.Score) (err error) {
	life, ctx := app.NewLifecycle(ctx, log)
	defer life.End(&err)
	engines, err := app.OpenEngines(c.Scoring, prometheus.NewRegistry(), slog.New(slog.DiscardHandler), life)
	if err != nil {
		return err
	}
	r, err := replay.Run(ctx, engines, stored)
	if err != nil {
		return err
	}
	if c.JSON {
		err = writeJSON(s.out, r)
	} else {
		err = printReplay(s, r)
	}
	if err == nil && !r.Agrees {
		err = errDifference
	}
	return err
}

func printReplay(s *streams, r *replay.Replay) error {
	receipt := r.Stored.Receipt
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "event\t%s of %s\n", printable(r.ID), printable(r.Source))
	fmt.Fprintf(w, "ensemble\t%s %s\n", r.Stored.Event.Data.Model, receipt.EnsembleDigest)
	fmt.Fprintf(w, "settings\t%s, class %q, seed %d, carrier %d\n", receipt.Settings, r.Stored.ClassLabel, receipt.Seed,
		receipt.Carrier)
	fmt.Fprintf(w, "\t\nmeasurement\tstored\trecomputed\trelative difference\n")
	for _, m := range r.Measurements() {
		fmt.Fprintf(w, "%s\t%.9g\t%.9g\t%.2g\n", m.Name, m.Stored.Value, m.Recomputed.Value, m.Difference)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	verdict := "agrees"
	if !r.Agrees {
		verdict = "does NOT agree"
	}
	_, err := fmt.Fprintf(s.out, "\nThe score %s within %g relative or %g absolute.\n", verdict, r.Tolerance, r.Floor)
	return err
}

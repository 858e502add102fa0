package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/replay"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type replayCmd struct {
	ID     string    `arg:"" help:"Id of the event."`
	Source string    `placeholder:"SOURCE" help:"Source of the event; required if several sources used the id."`
	Model  modelName `placeholder:"NAME" help:"Model of the event; required if several models used the id."`
	JSON   bool      `name:"json" help:"Print the comparison as JSON."`

	NATS    app.NATSConfig    `embed:"" prefix:"nats." group:"NATS"`
	Scoring app.ScoringConfig `embed:"" prefix:"scoring." group:"Scoring" hides:"background-share,profile,unreproducible"`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (replayCmd) Help() string {
	return `Reads a stored score, reruns its request from the receipt alone (seed, noise, class, steps, guidance, eta, ` +
		`branch steps, estimators, carrying component) through the ensemble of the same digest, and compares within the ` +
		`tolerance of docs/method.md. Exit code 0 if the two agree, 3 if they do not. A score that was made from the ` +
		`event's own latent needs that latent again, from NATS.

Example:

  decuwatch replay -e ensembles/fashion-mnist 0198c0de-7b1a-7000-8000-5f0d3c1b2a49`
}

func (c *replayCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		stored, err := store.ScoreByID(ctx, schema.Identity{Source: c.Source, ID: c.ID, Model: string(c.Model)})
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
	var r *replay.Replay
	if stored.Receipt.LatentSHA256 == "" {
		r, err = replay.Run(ctx, engines, nil, stored)
	} else {
		err = app.WithNATS("replay", c.NATS, log, func(js jetstream.JetStream) (err error) {
			r, err = replay.Run(ctx, engines, consumers.NewLatents(js, consumers.LatentConfig{}), stored)
			return err
		})
	}
	if err != nil {
		return err
	}
	if c.JSON {
		err = writeJSON(s.out, r)
	} else {
		err = r.Print(s.out)
	}
	if err == nil && !r.Agrees {
		err = errDifference
	}
	return err
}

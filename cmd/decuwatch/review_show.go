package main

import (
	"context"
	"log/slog"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type reviewShowCmd struct {
	ID       reviewID           `arg:"" help:"Id of the review; an alert and its review have the same id."`
	Images   string             `placeholder:"DIR" help:"Write the files of the evidence into this directory."`
	JSON     bool               `name:"json" help:"Print one line of JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (reviewShowCmd) Help() string {
	return `Examples:

  decuwatch review show 3f2a9c
  decuwatch review show 3f2a9c --images /tmp/evidence`
}

func (c *reviewShowCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		details, err := review.Load(ctx, store, string(c.ID))
		if err != nil {
			return err
		}
		if c.Images != "" {
			if err := details.WriteEvidence(ctx, store, c.Images); err != nil {
				return err
			}
		}
		if c.JSON {
			return writeJSON(s.out, details)
		}
		return details.Print(s.out)
	})
}

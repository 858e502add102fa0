package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type reviewStatsCmd struct {
	Model    modelName          `placeholder:"NAME" help:"Only this model."`
	Class    string             `placeholder:"CLASS" help:"Only this class: an index, or a label."`
	Days     int                `default:"30" placeholder:"N" help:"Count the events of the last N days."`
	JSON     bool               `name:"json" help:"Print one line of JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (reviewStatsCmd) Help() string {
	return `Precision is the share of reviewed alerts that were confirmed or expected, with the interval of Wilson. Recall
is estimated from the requests without an alert that were drawn at random. Its interval combines the interval of
precision and the interval of Clopper and Pearson of the share missed, each at half the error. Canaries are left out.

Example:

  decuwatch review stats --model fashion-mnist --days 7`
}

func (c *reviewStatsCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Days < 1 || c.Days > 3650 {
		return usage("--days is %d, must be 1 to 3650", c.Days)
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		class, _, err := storedClass(ctx, store, string(c.Model), c.Class)
		if err != nil {
			return err
		}
		now := time.Now()
		stats, err := review.LoadStats(ctx, store, string(c.Model), class, now.AddDate(0, 0, -c.Days), now)
		if err != nil {
			return err
		}
		if c.JSON {
			return writeJSON(s.out, stats)
		}
		return stats.Print(s.out)
	})
}

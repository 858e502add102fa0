package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type reviewListCmd struct {
	State    string               `default:"todo" enum:"todo,open,acknowledged,resolved,all" help:"State of the reviews."`
	Model    modelName            `placeholder:"NAME" help:"Only this model."`
	Class    string               `placeholder:"CLASS" help:"Only this class: an index, or a label."`
	Assignee string               `placeholder:"NAME" help:"Only reviews of this person."`
	Search   string               `placeholder:"TEXT" help:"Part of an event id or label, or a label as name=value."`
	Order    postgres.ReviewOrder `placeholder:"ORDER" help:"newest, oldest, or a measurement: the highest first."`
	Severity schema.Severity      `enum:"warn,critical," default:"" placeholder:"warn|critical" help:"Only this severity."`
	Limit    int                  `default:"50" help:"Maximum number of reviews to list."`
	JSON     bool                 `name:"json" help:"Print each review as one line of JSON."`
	Postgres app.PostgresConfig   `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (reviewListCmd) Help() string {
	return `A state is open, acknowledged or resolved; todo (the default) is open and acknowledged, all is every state.

Examples:

  decuwatch review list
  decuwatch review list --severity critical --model fashion-mnist
  decuwatch review list --state resolved --json | jq -r .verdict | sort | uniq -c`
}

func (c *reviewListCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Limit < 1 || c.Limit > 10_000 {
		return usage("--limit is %d, must be 1 to 10000", c.Limit)
	}
	filter := postgres.ReviewFilter{
		Model: string(c.Model), Assignee: c.Assignee, Severity: c.Severity, Search: c.Search, Order: c.Order, Limit: c.Limit,
	}
	if orders := postgres.ReviewOrders(); c.Order != "" && !slices.Contains(orders, c.Order) {
		return usage("--order is %q, must be one of %s", c.Order, schema.List(orders))
	}
	switch c.State {
	case "todo":
		filter.States = []schema.ReviewState{schema.ReviewOpen, schema.ReviewAcknowledged}
	case "all":
	default:
		filter.States = []schema.ReviewState{schema.ReviewState(c.State)}
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		var err error
		if filter.Class, _, err = storedClass(ctx, store, string(c.Model), c.Class); err != nil {
			return err
		}
		list, err := store.Reviews(ctx, filter)
		if err != nil {
			return err
		}
		unmarked := make([]postgres.Review, len(list))
		for i, r := range list {
			unmarked[i] = review.Unmarked(r)
		}
		switch {
		case c.JSON:
			return writeLines(s.out, unmarked)
		case len(list) == 0:
			_, err := fmt.Fprintln(s.out, "Nothing waits for a reviewer here.")
			return err
		}
		return review.PrintList(s.out, unmarked)
	})
}

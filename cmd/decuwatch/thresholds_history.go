package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type thresholdsHistoryCmd struct {
	Model    modelName          `placeholder:"NAME" help:"Changes of this model only."`
	Limit    int                `default:"20" help:"Maximum number of changes to list, newest first."`
	JSON     bool               `name:"json" help:"Print each change as one line of JSON, with its thresholds."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (thresholdsHistoryCmd) Help() string {
	return `Example:

  decuwatch thresholds history --model fashion-mnist`
}

func (c *thresholdsHistoryCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Limit < 1 {
		return usage("--limit is %d, must be at least 1", c.Limit)
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		changes, err := store.ThresholdHistory(ctx, string(c.Model), c.Limit)
		if err != nil {
			return err
		}
		if c.JSON {
			return writeLines(s.out, changes)
		}
		w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
		fmt.Fprintln(w, "change\tset at\tby\tkind\tthresholds\treason")
		for _, change := range changes {
			kind := change.Kind
			if change.Undoes != 0 {
				kind = fmt.Sprintf("%s of %d", kind, change.Undoes)
			}
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%d\t%s\n", change.ID, terminal.Time(change.SetAt),
				printable(change.SetBy), kind, len(change.Thresholds), printable(change.Reason))
		}
		return w.Flush()
	})
}

type thresholdsRollbackCmd struct {
	Reason   string             `required:"" placeholder:"TEXT" help:"Why, for the history."`
	By       string             `placeholder:"NAME" help:"Who does it. Defaults to the user who runs this."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (thresholdsRollbackCmd) Help() string {
	return `Undoes the newest change in force, of any model; a second rollback undoes the change before it. ` +
		`Running monitors follow at once.

Example:

  decuwatch thresholds rollback --reason "too many alerts"`
}

func (c *thresholdsRollbackCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	reason := strings.TrimSpace(c.Reason)
	if reason == "" {
		return usage("--reason is empty")
	}
	by, err := person(c.By)
	if err != nil {
		return err
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		change, err := store.RollbackThresholds(ctx, by, reason)
		if err != nil {
			return err
		}
		fmt.Fprintf(s.out, "change %d takes back change %d: %d thresholds\n", change.ID, change.Undoes,
			len(change.Thresholds))
		return warnNoneLeft(ctx, s, store, change)
	})
}

// warnNoneLeft names the measurements for which a change has left no threshold in force.
func warnNoneLeft(ctx context.Context, s *streams, store *postgres.Store, change postgres.ThresholdChange) error {
	left, err := store.Thresholds(ctx)
	if err != nil {
		return fmt.Errorf("the change is made, but what is left is unknown: %w", err)
	}
	var named []string
	for _, t := range change.Thresholds {
		text := fmt.Sprintf("%s of %s (ensemble %.12s)", t.Measurement, t.Model, t.EnsembleDigest)
		if slices.Contains(named, text) || slices.ContainsFunc(left, func(l schema.Threshold) bool {
			return l.Series() == t.Series() && l.Measurement == t.Measurement
		}) {
			continue
		}
		named = append(named, text)
		fmt.Fprintf(s.out, "Warning: no threshold is left for %s: scores are stored, but raise no alert. Set the first: "+
			"decuwatch thresholds from-reference --help\n", printable(text))
	}
	return nil
}

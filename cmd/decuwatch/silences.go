package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type silencesCmd struct {
	List silencesListCmd `cmd:"" help:"List the silences that are in force or still to come."`
	Add  silencesAddCmd  `cmd:"" help:"Stop sending the alerts of a model, class or measurement for a time."`
	End  silencesEndCmd  `cmd:"" help:"End a silence early."`
}

func (silencesCmd) Help() string {
	return `A silenced alert is stored, counted and reviewed like any other, but not sent. Canaries that were missed,
missing thresholds and summaries are never silenced. Running monitors follow at once.`
}

type silencesListCmd struct {
	Model modelName `placeholder:"NAME" help:"Silences of this model only."`
	Past  bool      `help:"Also list the silences that have ended."`
	Limit int       `default:"100" help:"Maximum number of silences to list, newest first."`
	JSON  bool      `name:"json" help:"Print each silence as one line of JSON."`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (c *silencesListCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Limit < 1 {
		return usage("--limit is %d, must be at least 1", c.Limit)
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		list, err := store.Silences(ctx, string(c.Model), c.Past, c.Limit)
		if err != nil {
			return err
		}
		if c.JSON {
			return writeLines(s.out, list)
		}
		if len(list) == 0 {
			_, err := fmt.Fprintln(s.out, "There are no silences.")
			return err
		}
		w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
		fmt.Fprintln(w, "id\tmodel\tclass\tmeasurement\tfrom\tuntil\tauthor\tsilenced\treason")
		for _, one := range list {
			until := terminal.Time(one.EndsAt)
			if one.EndedAt != nil {
				until = terminal.Time(*one.EndedAt) + " by " + printable(one.EndedBy)
			}
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", one.ID, printable(one.Model), silencedClass(one),
				orAll(string(one.Measurement)), terminal.Time(one.StartsAt), until, printable(one.Author), one.Silenced,
				printable(one.Reason))
		}
		return w.Flush()
	})
}

func silencedClass(s postgres.Silence) string {
	if s.ClassIndex == nil {
		return "all"
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", *s.ClassIndex, printable(s.ClassLabel)))
}

func orAll(s string) string {
	if s == "" {
		return "all"
	}
	return s
}

type silencesAddCmd struct {
	Model       modelName              `required:"" placeholder:"NAME" help:"Model."`
	Class       string                 `placeholder:"CLASS" help:"Class: an index, or a label. Defaults to every class."`
	Measurement schema.MeasurementName `placeholder:"NAME" help:"Measurement. Defaults to every measurement."`
	For         time.Duration          `required:"" placeholder:"DURATION" help:"How long it lasts, like 2h or 90m."`
	From        *time.Time             `placeholder:"TIME" help:"When it begins, RFC 3339. Defaults to now."`
	Reason      string                 `required:"" placeholder:"TEXT" help:"Why, for the history."`
	By          string                 `placeholder:"NAME" help:"Who adds it. Defaults to the user who runs this."`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (silencesAddCmd) Help() string {
	return `Examples:

  decuwatch silences add --model fashion-mnist --class Bag --for 4h --reason "new bags go live"
  decuwatch silences add --model fashion-mnist --measurement class_gap --for 90m --reason "incident 12"`
}

func (c *silencesAddCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	names := schema.MeasurementNames()
	switch {
	case c.For <= 0:
		return usage("--for is %s, must be more than 0", c.For)
	case c.For > postgres.MaxSilence || c.From != nil && c.From.After(time.Now().Add(postgres.MaxSilence)):
		return usage("--for is %s, must last and begin within a year", c.For)
	case strings.TrimSpace(c.Reason) == "":
		return usage("--reason is empty")
	case c.Measurement != "" && !slices.Contains(names, c.Measurement):
		return usage("--measurement is %q, must be one of %s", c.Measurement, schema.List(names))
	}
	author, err := person(c.By)
	if err != nil {
		return err
	}
	add := postgres.Silence{
		Model: string(c.Model), Measurement: c.Measurement, Author: author, Reason: strings.TrimSpace(c.Reason),
	}
	if c.From != nil {
		add.StartsAt = *c.From
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) (err error) {
		if add.ClassIndex, add.ClassLabel, err = storedClass(ctx, store, string(c.Model), c.Class); err != nil {
			return err
		}
		id, err := store.AddSilence(ctx, add, c.For)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(s.out, "silence %d: alerts of %s, class %s, measurement %s are stored but not sent for %s\n",
			id, printable(add.Model), silencedClass(add), orAll(string(add.Measurement)), c.For)
		return err
	})
}

type silencesEndCmd struct {
	ID int64  `arg:"" help:"Number of the silence."`
	By string `placeholder:"NAME" help:"Who ends it. Defaults to the user who runs this."`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (c *silencesEndCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.ID < 1 {
		return usage("id is %d, must be at least 1", c.ID)
	}
	ender, err := person(c.By)
	if err != nil {
		return err
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		if err := store.EndSilence(ctx, c.ID, ender); err != nil {
			return err
		}
		_, err := fmt.Fprintf(s.out, "silence %d has ended\n", c.ID)
		return err
	})
}

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type deadLettersCmd struct {
	List      deadLettersListCmd `cmd:"" help:"List messages that could not be scored, newest first."`
	Show      deadLettersShowCmd `cmd:"" help:"Show one with its payload."`
	Republish redeliverCmd       `cmd:"" help:"Publish the event again, as it was or corrected."`
}

func (deadLettersCmd) Help() string {
	return `A message that cannot be scored becomes a dead letter, with the reason. Whose fault it was decides how its
event gets a score:

  * orphaned, unknown_model, given_up, failed: publish it again as it was, once the cause is gone.
  * invalid: correct the event and publish it with the same id. The dead letter claims nothing.
  * unknown_class, non_finite, duplicate_id: the identity has its verdict. Correct the event and give it a new id.`
}

type deadLettersListCmd struct {
	Model    string                  `placeholder:"NAME" help:"Only this model."`
	Source   string                  `placeholder:"SOURCE" help:"Only events of this source."`
	Kind     []schema.DeadLetterKind `placeholder:"KIND" help:"Only these kinds, like invalid or orphaned."`
	Limit    int                     `default:"50" help:"Maximum number of dead letters to list."`
	JSON     bool                    `name:"json" help:"Print each dead letter as one line of JSON."`
	Postgres app.PostgresConfig      `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout"`
}

func (deadLettersListCmd) Help() string {
	return `Examples:

  decuwatch dead-letters list
  decuwatch dead-letters list --kind invalid --source //studio/render-7 --json | jq -r '[.field, .reason] | @tsv'`
}

func (c *deadLettersListCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Limit < 1 || c.Limit > 10_000 {
		return usage("--limit is %d, must be 1 to 10000", c.Limit)
	}
	for _, kind := range c.Kind {
		if kinds := schema.DeadLetterKinds(); !slices.Contains(kinds, kind) {
			return usage("--kind is %q, must be one of %s", kind, schema.List(kinds))
		}
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		filter := postgres.DeadLetterFilter{Model: c.Model, Source: c.Source, Kinds: c.Kind}
		list, err := store.DeadLetters(ctx, filter, c.Limit)
		if err != nil {
			return err
		}
		if c.JSON {
			return writeLines(s.out, list)
		}
		if len(list) == 0 {
			_, err := fmt.Fprintln(s.out, "There are no dead letters.")
			return err
		}
		w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
		fmt.Fprintln(w, "id\trecorded at\tkind\tmodel\tsource\tevent\tnow\treason")
		for _, l := range list {
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.ID, terminal.Time(l.RecordedAt), l.Kind, dashed(l.Model),
				dashed(l.Source), dashed(l.EventID), became(l), printable(strings.TrimSpace(l.Field+" "+l.Reason)))
		}
		return w.Flush()
	})
}

func dashed(s string) string { return cmp.Or(printable(s), "-") }

// became says what became of a dead letter's event since.
func became(l postgres.DeadLetter) string {
	switch {
	case l.Outcome != "" && l.Outcome != schema.OutcomeDeadLetter:
		return string(l.Outcome)
	case l.Republished != nil:
		return fmt.Sprintf("republished as %d", *l.Republished)
	}
	return "-"
}

type deadLettersShowCmd struct {
	ID       int64              `arg:"" help:"Id of the dead letter."`
	JSON     bool               `name:"json" help:"Print one line of JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout"`
}

func (deadLettersShowCmd) Help() string {
	return `To correct an event, write its payload to a file, edit it, and republish it.

Example:

  decuwatch dead-letters show 4711 --json | jq -r .payload >event.json`
}

func (c *deadLettersShowCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.ID < 1 {
		return usage("id is %d, must be at least 1", c.ID)
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		l, err := store.DeadLetterByID(ctx, c.ID)
		if err != nil {
			return err
		}
		if c.JSON {
			return writeJSON(s.out, struct {
				postgres.DeadLetter
				Payload string `json:"payload"` // bytes that are no UTF-8 are replaced
			}{l, string(l.Payload)})
		}
		return printDeadLetter(s.out, l)
	})
}

func printDeadLetter(out io.Writer, l postgres.DeadLetter) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "id\t%d\nkind\t%s\nfield\t%s\nreason\t%s\n", l.ID, l.Kind, dashed(l.Field), dashed(l.Reason))
	fmt.Fprintf(w, "model\t%s\nsource\t%s\nevent\t%s\n", dashed(l.Model), dashed(l.Source), dashed(l.EventID))
	if l.EventTime != nil {
		fmt.Fprintf(w, "event time\t%s\n", terminal.Time(*l.EventTime))
	}
	fmt.Fprintf(w, "recorded at\t%s\nmessage\t%d of %s, on %s, delivery %d\n", terminal.Time(l.RecordedAt), l.Sequence,
		printable(l.Stream), printable(l.Subject), l.Delivered)
	fmt.Fprintf(w, "now\t%s\npayload\t%s, %d bytes as it came\n", became(l), l.PayloadState, l.PayloadBytes)
	if err := w.Flush(); err != nil {
		return err
	}
	text := fmt.Sprintf("%q", l.Payload) // as Go writes bytes
	if utf8.Valid(l.Payload) {
		lines := strings.Split(string(l.Payload), "\n")
		for i := range lines {
			lines[i] = printable(strings.ReplaceAll(lines[i], "\t", "  "))
		}
		text = strings.Join(lines, "\n")
	}
	_, err := fmt.Fprintf(out, "\n%s\n", text)
	return err
}

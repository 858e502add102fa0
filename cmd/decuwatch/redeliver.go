package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/redeliver"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type redeliverCmd struct {
	IDs   []int64                 `arg:"" optional:"" name:"id" help:"Ids in decuwatch_views.dead_letters."`
	Event string                  `placeholder:"FILE" help:"Corrected CloudEvent to publish instead; - is stdin."`
	NewID bool                    `name:"new-id" help:"Give the corrected event a new id."`
	Model string                  `placeholder:"NAME" help:"Only this model."`
	Kind  []schema.DeadLetterKind `placeholder:"KIND" help:"Only orphaned, unknown_model, given_up or failed."`
	From  uint64                  `placeholder:"SEQUENCE" help:"First message of the stream. Defaults to 0."`
	To    uint64                  `placeholder:"SEQUENCE" help:"Last message of the stream. Defaults to the newest."`
	Apply bool                    `help:"Publish the messages again instead of only listing them."`
	By    string                  `placeholder:"NAME" help:"Name of the operator. Defaults to the current user."`

	NATS   app.NATSConfig         `embed:"" prefix:"nats." group:"NATS"`
	Stream consumers.StreamConfig `embed:"" prefix:"stream." group:"Stream of events" shows:"name"`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (redeliverCmd) Help() string {
	return `Publishes events again that became dead letters through no fault of their own: nobody scored their model, or
their workers ended or failed. The message comes from the stream, or from the dead letter if it has left the stream. It
gets a new verdict. The dead letter stays, and the name of the operator is recorded. Exit code 0 if every selected
event was, or can be, published again; 3 if one cannot.

With --event, a corrected event takes the place of a dead letter of any kind. It may keep its source and id if these
have no verdict yet, as after kind invalid. Otherwise the first verdict stands, and the event needs --new-id.

Examples:

  decuwatch dead-letters republish --model sdxl-class --kind orphaned
  decuwatch dead-letters republish --model sdxl-class --kind orphaned --apply
  decuwatch dead-letters republish 4711 4712 --apply
  decuwatch dead-letters republish 4713 --event corrected.json --apply`
}

func (c *redeliverCmd) validate() error {
	for _, kind := range c.Kind {
		if !slices.Contains(redeliver.Kinds(), kind) {
			return usage("--kind is %q, must be %s: a message of any other kind would fail again",
				kind, schema.List(redeliver.Kinds()))
		}
	}
	for _, id := range c.IDs {
		if id < 1 {
			return usage("id is %d, must be at least 1", id)
		}
	}
	switch {
	case c.Event != "" && (len(c.IDs) != 1 || c.Model != "" || len(c.Kind) > 0 || c.From > 0 || c.To > 0):
		return usage("--event takes the id of one dead letter, and no other selection")
	case c.NewID && c.Event == "":
		return usage("--new-id is for a corrected event: give --event")
	case c.To > 0 && c.To < c.From:
		return usage("--to is %d, must be at least --from, %d", c.To, c.From)
	case !c.Apply || len(c.IDs) > 0 || c.Model != "" || len(c.Kind) > 0 || c.From > 0 || c.To > 0:
		return nil
	}
	return usage("--apply needs a selection: numbers of dead letters, --model, --kind, --from or --to")
}

func (c *redeliverCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if err := c.validate(); err != nil {
		return err
	}
	if c.Apply {
		var err error
		if c.By, err = person(c.By); err != nil {
			return err
		}
	}
	work := c.redeliver
	if c.Event != "" {
		event, err := c.corrected(s.in)
		if err != nil {
			return err
		}
		work = func(ctx context.Context, s *streams, js jetstream.JetStream, store *postgres.Store) error {
			return c.correct(ctx, s, js, store, event)
		}
	}
	return app.WithServers(ctx, "redeliver", c.NATS, c.Postgres, log,
		func(js jetstream.JetStream, store *postgres.Store) error { return work(ctx, s, js, store) })
}

// corrected reads the corrected event.
func (c *redeliverCmd) corrected(stdin io.Reader) (schema.Event, error) {
	in := stdin
	if c.Event != "-" {
		f, err := os.Open(c.Event)
		if err != nil {
			return schema.Event{}, usage("--event: %w", err)
		}
		defer f.Close() //nolint:errcheck // only read
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, schema.MaxPayload+1))
	if err != nil {
		return schema.Event{}, fmt.Errorf("read %s: %w", c.Event, err)
	}
	e, err := schema.Decode(nil, text)
	if err != nil {
		return schema.Event{}, usage("%s: %w", c.Event, err)
	}
	if c.NewID {
		e.ID = schema.NewEvent(e.Source, e.Data).ID
	}
	return e, nil
}

// correct publishes a corrected event in place of one dead letter's.
func (c *redeliverCmd) correct(ctx context.Context, s *streams, js jetstream.JetStream, store *postgres.Store,
	e schema.Event,
) error {
	l, err := store.DeadLetterByID(ctx, c.IDs[0])
	if err != nil {
		return err
	}
	sequence, err := redeliver.Correct(ctx, js, store, l, e, c.Apply)
	if errors.Is(err, redeliver.ErrSettled) {
		return fmt.Errorf("%w: --new-id", err)
	}
	if err != nil {
		return err
	}
	what := "can be published; --apply does it"
	if c.Apply {
		what = fmt.Sprintf("was published as message %d", sequence)
	}
	_, err = fmt.Fprintf(s.out, "the corrected event %s of %s %s\n", printable(e.ID), printable(e.Source), what)
	return err
}

func (c *redeliverCmd) redeliver(ctx context.Context, s *streams, js jetstream.JetStream, store *postgres.Store) error {
	if len(c.Kind) == 0 {
		c.Kind = redeliver.Kinds()
	}
	can, cannot := 0, 0
	left := slices.Clone(c.IDs)
	err := redeliver.Run(ctx, redeliver.Options{
		JetStream: js, Store: store, By: c.By, Apply: c.Apply,
		Query: postgres.DeadLetterQuery{
			Stream: c.Stream.Name, Model: c.Model, Kinds: c.Kind, From: c.From, To: c.To, IDs: c.IDs,
		},
	}, func(r redeliver.Result) error {
		left = slices.DeleteFunc(left, func(id int64) bool { return id == r.DeadLetter.ID })
		if r.Refused != "" {
			cannot++
		} else {
			can++
		}
		_, err := fmt.Fprintln(s.out, r)
		return err
	})
	if err != nil {
		return err
	}
	for _, id := range left {
		cannot++
		fmt.Fprintf(s.out, "%d\tis not among the dead letters that the flags select, or was redelivered before\n", id)
	}
	verb := "can be published again; --apply does it"
	if c.Apply {
		verb = "were published again"
	}
	fmt.Fprintf(s.out, "%d events %s, %d cannot be\n", can, verb, cannot)
	if cannot > 0 {
		return errDifference
	}
	return nil
}

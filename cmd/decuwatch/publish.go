package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"reflect"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
)

type publishCmd struct {
	File string `arg:"" optional:"" help:"JSONL file, or - for stdin. Without it, the flags describe one event."`

	Model        string  `placeholder:"NAME" help:"Model of the event, and of lines without a model."`
	ID           string  `placeholder:"ID" help:"Id of the event. Defaults to a new one."`
	Source       string  `default:"/decuwatch/publish" help:"Source of the event."`
	Class        string  `placeholder:"CLASS" help:"Class: an index, or a label."`
	Seed         *uint64 `placeholder:"N" help:"Seed of the first latent."`
	samplerFlags `embed:""`
	latentFlags  `embed:""`
	Concurrency  int            `default:"64" help:"Maximum number of events in flight."`
	NATS         app.NATSConfig `embed:"" prefix:"nats." group:"NATS"`

	Stream consumers.StreamConfig `embed:"" prefix:"stream." group:"Stream of events" hides:"keep-settled,check-interval"`
}

func (publishCmd) Help() string {
	return `A line of the file is a CloudEvent in structured mode, or only its data ({"model": ..., "class": ..., "seed":
...}), which gets a new id, the current time and --source. It is safe to publish an event with the same source and id
again: the first verdict stands.

Every line is checked before anything is sent. The error names the number of an invalid line.

Examples:

  decuwatch publish --model fashion-mnist --class "Ankle boot" --seed 7
  decuwatch publish --model fashion-mnist --class 0 --seed 8 --steps 50 --guidance 2 --label tenant=acme
  decuwatch publish --model fashion-mnist --class 0 --seed 8 --latent first.safetensors
  decuwatch publish events.jsonl`
}

func (c *publishCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Concurrency < 1 || c.Concurrency > 10_000 {
		return usage("--concurrency is %d, must be 1 to 10000", c.Concurrency)
	}
	events, err := c.events(s.in)
	if err != nil {
		return err
	}
	return app.WithNATS("publish", c.NATS, log, func(js jetstream.JetStream) error {
		if err := app.EnsureEvents(ctx, js, c.Stream, app.DefaultConfig().Alerts); err != nil {
			return err
		}
		if err := c.publish(ctx, js, &events[0]); err != nil {
			return err
		}
		bar := progress(s, len(events), "publishing")
		stored, repeated, err := schema.PublishAll(ctx, js, events, c.Concurrency, func() { _ = bar.Add(1) }) // it only draws
		_ = bar.Exit()
		if err != nil {
			return fmt.Errorf("%w (%d of %d events are stored; publish them again with the same ids)", err, stored, len(events))
		}
		if len(events) == 1 {
			e := events[0]
			fmt.Fprintf(s.out, "published %s of %s to %s\n", e.ID, e.Source, schema.SubjectGeneration(e.Data.Model))
		} else {
			fmt.Fprintf(s.out, "published %d events\n", stored)
		}
		if repeated > 0 {
			fmt.Fprintf(s.out, "%d of them stood in the stream already\n", repeated)
		}
		return nil
	})
}

// events returns the events to publish, all of them valid.
func (c *publishCmd) events(stdin io.Reader) ([]schema.Event, error) {
	switch c.File {
	case "":
		if c.Model == "" || c.Class == "" || c.Seed == nil {
			return nil, usage("--model, --class and --seed are required without a file")
		}
		if err := c.check(); err != nil {
			return nil, err
		}
		e := schema.NewEvent(c.Source, c.generation(c.Model, schema.ParseClass(c.Class), *c.Seed))
		if c.ID != "" {
			e.ID = c.ID
		}
		if err := c.read(&e); err != nil {
			return nil, err
		}
		if _, _, err := schema.Encode(e); err != nil {
			return nil, usage("%w", err)
		}
		return []schema.Event{e}, nil
	}
	if c.ID != "" || c.Class != "" || c.Seed != nil || !reflect.ValueOf(c.samplerFlags).IsZero() ||
		!reflect.ValueOf(c.latentFlags).IsZero() {
		return nil, usage("a file's lines say what they are: with a file, only --model and --source describe events")
	}
	if c.File == "-" {
		return c.lines(stdin, "stdin")
	}
	f, err := os.Open(c.File)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	return c.lines(f, c.File)
}

// lines reads one event from each line that is not empty.
func (c *publishCmd) lines(r io.Reader, name string) ([]schema.Event, error) {
	var events []schema.Event
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 0, 64<<10), 2*schema.MaxPayload)
	for line := 1; in.Scan(); line++ {
		text := bytes.TrimSpace(in.Bytes())
		if len(text) == 0 {
			continue
		}
		e, err := schema.DecodeLine(text, c.Source, c.Model)
		if err != nil {
			return nil, usage("%s:%d: %w", name, line, err)
		}
		events = append(events, e)
	}
	if err := in.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(events) == 0 {
		return nil, usage("%s holds no events", name)
	}
	return events, nil
}

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/schollz/progressbar/v3"
	"golang.org/x/sync/errgroup"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
)

type publishCmd struct {
	File string `arg:"" optional:"" help:"JSONL file of events or of their data, - is stdin. Without it one event is published from the flags below."`

	Model        string `placeholder:"NAME" help:"Model that generated. Required without a file; with one, of lines without a model."`
	ID           string `placeholder:"ID" help:"Id of the event. Defaults to a new one."`
	Source       string `default:"/decuwatch/publish" help:"Source of the event."`
	Class        string `placeholder:"CLASS" help:"Class: an index, or a label."`
	Seed         uint64 `help:"Seed of the first latent."`
	samplerFlags `embed:""`
	Concurrency  int                    `default:"64" help:"Events that wait for the stream's answer at once."`
	NATS         app.NATSConfig         `embed:"" prefix:"nats." group:"NATS"`
	Stream       consumers.StreamConfig `embed:"" prefix:"stream." group:"Stream of events"`
}

func (publishCmd) Help() string {
	return `A line of the file is a CloudEvent in structured mode, or the data of one ({"model": ..., "class": ..., "seed": ...}), which then gets a new id, the time of now and --source. Publishing events with the same source and id again is safe: the first verdict stands.

Every line is checked before anything is sent; a broken one is named with its number.

Examples:

  decuwatch publish --model fashion-mnist --class "Ankle boot" --seed 7
  decuwatch publish --model fashion-mnist --class 0 --seed 8 --steps 50 --guidance 2 --label tenant=acme
  decuwatch publish events.jsonl`
}

func (c *publishCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	events, err := c.events(s.in)
	if err != nil {
		return err
	}
	nc, err := c.NATS.Connect("publish", false, log)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	if _, err := consumers.EnsureStream(ctx, js, c.Stream); err != nil {
		return app.ExplainRoom(ctx, js, c.Stream, app.DefaultConfig().Alerts, err)
	}
	stored, repeated, err := publishAll(ctx, js, events, c.Concurrency, s)
	if err != nil {
		return fmt.Errorf("%w (%d of %d events are stored; publish them again with the same ids)", err, stored, len(events))
	}
	if len(events) == 1 {
		fmt.Fprintf(s.out, "published %s of %s to %s\n", events[0].ID, events[0].Source, schema.SubjectGeneration(events[0].Data.Model))
	} else {
		fmt.Fprintf(s.out, "published %d events\n", stored)
	}
	if repeated > 0 {
		fmt.Fprintf(s.out, "%d of them stood in the stream already\n", repeated)
	}
	return nil
}

// events returns the events to publish, all of them valid.
func (c *publishCmd) events(stdin io.Reader) ([]schema.Event, error) {
	switch c.File {
	case "":
		if c.Model == "" || c.Class == "" {
			return nil, usage("--model and --class are required without a file")
		}
		e := c.event(c.generation(c.Model, class(c.Class), c.Seed))
		if c.ID != "" {
			e.ID = c.ID
		}
		if _, _, err := schema.Encode(e); err != nil {
			return nil, usage("%w", err)
		}
		return []schema.Event{e}, nil
	case "-":
		return c.lines(stdin, "stdin")
	}
	f, err := os.Open(c.File)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	return c.lines(f, c.File)
}

// event returns a new event with the given data.
func (c *publishCmd) event(g schema.Generation) schema.Event {
	return schema.Event{Source: c.Source, ID: uuid.Must(uuid.NewV7()).String(), Time: time.Now().UTC().Truncate(time.Microsecond), Data: g}
}

// lines reads one event a line; empty lines are passed over.
func (c *publishCmd) lines(r io.Reader, name string) ([]schema.Event, error) {
	var events []schema.Event
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 0, 64<<10), 2*schema.MaxPayload)
	for line := 1; in.Scan(); line++ {
		text := bytes.TrimSpace(in.Bytes())
		if len(text) == 0 {
			continue
		}
		e, err := c.line(text)
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

func (c *publishCmd) line(text []byte) (schema.Event, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		return schema.Event{}, fmt.Errorf("not a JSON object: %w", err)
	}
	if _, whole := fields["specversion"]; whole {
		return schema.Decode(nil, text)
	}
	if _, given := fields["model"]; !given && c.Model != "" {
		fields["model"], _ = json.Marshal(c.Model) // a string is always JSON
	}
	// The data goes through the decoder within an envelope, so that its bounds and its unknown fields are checked.
	e := c.event(schema.Generation{})
	envelope, err := json.Marshal(map[string]any{
		"specversion": "1.0", "type": schema.TypeGenerationRequested, "source": e.Source, "id": e.ID, "time": e.Time.Format(time.RFC3339Nano), "data": fields,
	})
	if err != nil {
		return schema.Event{}, err
	}
	return schema.Decode(nil, envelope)
}

// publishAll publishes events with a progress bar and returns how many the stream has stored, and how many of those it
// had already.
func publishAll(ctx context.Context, js jetstream.JetStream, events []schema.Event, concurrency int, s *streams) (stored, repeated int64, err error) {
	bar := progress(s, len(events), "publishing")
	var done, again atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(1, concurrency))
	for _, e := range events {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			ack, err := schema.Publish(ctx, js, e)
			if err != nil {
				return err
			}
			done.Add(1)
			if ack.Duplicate {
				again.Add(1)
			}
			return bar.Add(1)
		})
	}
	err = group.Wait()
	if err == nil {
		err = ctx.Err()
		if done.Load() == int64(len(events)) {
			err = nil
		}
	}
	_ = bar.Exit() // it only draws
	return done.Load(), again.Load(), err
}

// progress returns a bar on stderr, or one that is not seen where stderr is no terminal or there is little to do.
func progress(s *streams, total int, what string) *progressbar.ProgressBar {
	if !s.progress || total < 2 {
		return progressbar.DefaultSilent(int64(total), what)
	}
	return progressbar.NewOptions(total,
		progressbar.OptionSetWriter(s.err), progressbar.OptionSetDescription(fmt.Sprintf("%-12s", what)), progressbar.OptionSetWidth(40),
		progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(65*time.Millisecond),
		progressbar.OptionSetTheme(progressbar.Theme{Saucer: "█", SaucerPadding: "·", BarStart: "▕", BarEnd: "▏"}),
		progressbar.OptionOnCompletion(func() { fmt.Fprintln(s.err) }),
	)
}

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

type watchCmd struct {
	Model    string        `placeholder:"NAME" help:"Alerts of this model only."`
	Severity string        `enum:"warn,critical," default:"" placeholder:"warn|critical" help:"Alerts of this severity only."`
	Class    string        `placeholder:"CLASS" help:"Alerts of this class only: an index, or a label."`
	Since    time.Duration `placeholder:"DURATION" help:"Begin with the alerts of the last so long. Defaults to none: alerts from now on."`
	All      bool          `help:"Begin with every alert that the stream holds."`
	NoFollow bool          `help:"End after the alerts that are there, instead of waiting for more."`
	JSON     bool          `name:"json" help:"Print each alert as one line of JSON."`

	ReviewURL string       `name:"review.url" default:"http://127.0.0.1:8080" placeholder:"URL" group:"Review" help:"Where the review page is, for the link to each alert. Defaults to http://127.0.0.1:8080."`
	NATS      NATSConfig   `embed:"" prefix:"nats." group:"NATS"`
	Alerts    AlertsConfig `embed:"" prefix:"alerts." group:"Alerts"`

	quiet bool // about what is watched
}

func (watchCmd) Help() string {
	return `Alerts reach the stream at least once; each is printed once.

Examples:

  decuwatch watch
  decuwatch watch --severity critical --since 1h
  decuwatch watch --all --no-follow --json | jq -r '[.class_label, .decided] | @tsv'`
}

// filter returns the subject that the flags ask for.
func (c *watchCmd) filter() string {
	token := func(v string) string {
		if v == "" {
			return "*"
		}
		return v
	}
	class := "*"
	if _, err := strconv.Atoi(c.Class); err == nil {
		class = c.Class
	}
	return strings.Join([]string{"uncertainty", "alert", token(c.Model), token(c.Severity), class}, ".")
}

func (c *watchCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if strings.ContainsAny(c.Model, ". *>\t") {
		return usage("--model %q is not a model's name", c.Model)
	}
	nc, err := c.NATS.connect("watch", false, log)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	stream, err := js.Stream(ctx, c.Alerts.Stream)
	if err != nil {
		return fmt.Errorf("stream of alerts %s: %w (does decuwatch serve run?)", c.Alerts.Stream, err)
	}
	config := jetstream.OrderedConsumerConfig{FilterSubjects: []string{c.filter()}, DeliverPolicy: jetstream.DeliverNewPolicy}
	switch {
	case c.All:
		config.DeliverPolicy = jetstream.DeliverAllPolicy
	case c.Since > 0:
		from := time.Now().Add(-c.Since)
		config.DeliverPolicy, config.OptStartTime = jetstream.DeliverByStartTimePolicy, &from
	}
	consumer, err := stream.OrderedConsumer(ctx, config)
	if err != nil {
		return fmt.Errorf("watch %s: %w", c.Alerts.Stream, err)
	}
	if c.NoFollow {
		info, err := consumer.Info(ctx)
		if err != nil {
			return fmt.Errorf("watch %s: %w", c.Alerts.Stream, err)
		}
		if info.NumPending == 0 {
			return nil
		}
	} else if s.terminal && !c.JSON && !c.quiet {
		fmt.Fprintf(s.err, "watching %s on %s; Ctrl-C ends\n", c.filter(), redact(c.NATS.URL))
	}
	messages, err := consumer.Messages()
	if err != nil {
		return fmt.Errorf("watch %s: %w", c.Alerts.Stream, err)
	}
	defer messages.Stop()
	defer context.AfterFunc(ctx, messages.Stop)()
	printed := seen{}
	for {
		msg, err := messages.Next()
		if ctx.Err() != nil {
			return nil // Ctrl-C is how watching ends
		}
		if err != nil {
			return fmt.Errorf("watch %s: %w", c.Alerts.Stream, err)
		}
		a, err := schema.DecodeAlert(msg.Data())
		if err != nil {
			log.Warn("a message of the stream is not an alert", "subject", msg.Subject(), "err", err)
		} else if c.wants(a) && printed.first(a.ID) {
			if err := c.print(s, a); err != nil {
				return err
			}
		}
		if meta, err := msg.Metadata(); err == nil && c.NoFollow && meta.NumPending == 0 {
			return nil
		}
	}
}

// wants reports whether the alert is of the class that was asked for.
func (c *watchCmd) wants(a schema.Alert) bool {
	if c.Class == "" || strconv.Itoa(a.ClassIndex) == c.Class {
		return true
	}
	return strings.EqualFold(a.ClassLabel, c.Class)
}

func (c *watchCmd) print(s *streams, a schema.Alert) error {
	if c.JSON {
		return json.NewEncoder(s.out).Encode(a)
	}
	printAlert(s.out, a, s.terminal)
	link := c.Alerts.Link
	if link == "" {
		link = reviewLink(c.ReviewURL)
	}
	if link != "" {
		fmt.Fprintf(s.out, "    %s%s\n", link, a.ID)
	}
	return nil
}

// printAlert prints an alert in one line.
func printAlert(w io.Writer, a schema.Alert, colour bool) {
	severity := fmt.Sprintf("%-8s", a.Severity)
	if colour {
		severity = colours[a.Severity] + severity + "\x1b[0m"
	}
	saturated := ""
	if a.Saturated {
		saturated = ", saturated"
	}
	fmt.Fprintf(w, "%s  %s  %-14s %-16s %-12s %8.4g >= %-9.4g %s%s  %s\n", a.FiredAt.Local().Format("15:04:05"), severity, printable(a.Model),
		printable(a.ClassLabel), a.Measurement, a.Decided, a.Threshold, a.Reason, saturated, printable(a.EventID))
}

var colours = map[string]string{schema.SeverityWarn: "\x1b[33m", schema.SeverityCritical: "\x1b[1;31m"}

// printable makes text that comes from outside fit for a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// seen remembers the last few thousand identifiers.
type seen struct {
	ids   map[string]bool
	order []string
}

// first reports whether an id was not seen before.
func (s *seen) first(id string) bool {
	const most = 10_000
	if s.ids[id] {
		return false
	}
	if s.ids == nil {
		s.ids = map[string]bool{}
	}
	if len(s.order) == most {
		delete(s.ids, s.order[0])
		s.order = s.order[1:]
	}
	s.ids[id] = true
	s.order = append(s.order, id)
	return true
}

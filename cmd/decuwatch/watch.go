package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

type watchCmd struct {
	Model    string          `placeholder:"NAME" help:"Alerts of this model only."`
	Severity schema.Severity `enum:"warn,critical," default:"" placeholder:"warn|critical" help:"Alerts of this severity only."`
	Class    string          `placeholder:"CLASS" help:"Alerts of this class only: an index, or a label."`
	Since    time.Duration   `placeholder:"DURATION" help:"Begin with the alerts of the last so long. Defaults to none: alerts from now on."`
	All      bool            `help:"Begin with every alert that the stream holds."`
	NoFollow bool            `help:"End after the alerts that are there, instead of waiting for more."`
	JSON     bool            `name:"json" help:"Print each alert as one line of JSON."`

	ReviewURL string           `name:"review.url" default:"http://127.0.0.1:8080" placeholder:"URL" group:"Review" help:"Where the review page is, for the link to each alert. Defaults to http://127.0.0.1:8080."`
	NATS      app.NATSConfig   `embed:"" prefix:"nats." group:"NATS"`
	Alerts    app.AlertsConfig `embed:"" prefix:"alerts." group:"Alerts"`

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
	return strings.Join([]string{"uncertainty", "alert", token(c.Model), token(string(c.Severity)), class}, ".")
}

func (c *watchCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if strings.ContainsAny(c.Model, ". *>\t") {
		return usage("--model %q is not a model's name", c.Model)
	}
	nc, err := c.NATS.Connect("watch", false, log)
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
	next, err := c.begin(ctx, js, stream.CachedInfo().State)
	if err != nil {
		return fmt.Errorf("watch %s: %w", c.Alerts.Stream, err)
	}
	if !c.NoFollow && s.terminal && !c.JSON && !c.quiet {
		fmt.Fprintf(s.err, "watching %s on %s; Ctrl-C ends\n", c.filter(), settings.Redact(c.NATS.URL))
	}
	return c.follow(ctx, s, js, next, log)
}

// begin returns the sequence number of the first message that is looked at.
func (c *watchCmd) begin(ctx context.Context, js jetstream.JetStream, state jetstream.StreamState) (uint64, error) {
	first, end := max(state.FirstSeq, 1), state.LastSeq+1
	if c.All {
		return first, nil
	}
	if c.Since <= 0 {
		return end, nil
	}
	from := time.Now().Add(-c.Since)
	for first < end { // messages are stored in order of time
		middle := first + (end-first)/2
		m, err := consumers.ReadStored(ctx, js, c.Alerts.Stream, middle, true)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			end = middle
		case err != nil:
			return 0, err
		case m.Time.Before(from):
			first = m.Sequence + 1
		default:
			end = middle
		}
	}
	return first, nil
}

// watchEvery is the interval at which new alerts are asked for.
const watchEvery = 300 * time.Millisecond

// follow prints alerts from a sequence number on. It reads the stream without a consumer, so that watching needs no right to
// make one.
func (c *watchCmd) follow(ctx context.Context, s *streams, js jetstream.JetStream, next uint64, log *slog.Logger) error {
	printed := seen{}
	away := false
	for {
		try, cancel := context.WithTimeout(ctx, 10*time.Second)
		m, err := consumers.ReadNext(try, js, c.Alerts.Stream, next, c.filter())
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // Ctrl-C is how watching ends
		case err == nil:
			away, next = false, m.Sequence+1
			if err := c.show(s, m, printed, log); err != nil {
				return err
			}
			continue
		case c.NoFollow && errors.Is(err, jetstream.ErrMsgNotFound):
			return nil
		case errors.Is(err, jetstream.ErrMsgNotFound):
			away = false
		case c.NoFollow || js.Conn().IsClosed():
			return fmt.Errorf("watch %s: %w", c.Alerts.Stream, err)
		case !away:
			away = true
			log.Warn("alerts cannot be read, and are asked for again", "stream", c.Alerts.Stream, "err", err)
		}
		select {
		case <-time.After(watchEvery):
		case <-ctx.Done():
			return nil
		}
	}
}

func (c *watchCmd) show(s *streams, m consumers.Stored, printed seen, log *slog.Logger) error {
	a, err := schema.DecodeAlert(m.Payload)
	if err != nil {
		log.Warn("a message of the stream is not an alert", "subject", m.Subject, "err", err)
		return nil
	}
	if c.wants(a) && printed.first(a.ID) {
		return c.print(s, a)
	}
	return nil
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
		link = app.ReviewLink(c.ReviewURL)
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

var colours = map[schema.Severity]string{schema.SeverityWarn: "\x1b[33m", schema.SeverityCritical: "\x1b[1;31m"}

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

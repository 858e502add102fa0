// Package watch follows the stream of alerts.
package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
)

// Config says which alerts to follow. Empty fields select every alert.
type Config struct {
	Stream   string
	Model    string
	Severity schema.Severity
	Class    string // an index, or a label

	All    bool          // start with every alert of the stream
	Since  time.Duration // start with the alerts of this time. Defaults to new alerts only
	Follow bool          // wait for more alerts after the last one
	Log    *slog.Logger
}

// Subject returns the subject that all selected alerts match.
func (c Config) Subject() string {
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

// selects reports whether an alert is of the class.
func (c Config) selects(a schema.Alert) bool {
	return c.Class == "" || strconv.Itoa(a.ClassIndex) == c.Class || strings.EqualFold(a.ClassLabel, c.Class)
}

// every is the interval at which new alerts are asked for.
const every = 300 * time.Millisecond

// Run calls show with each selected alert once, in the order of the stream. It ends with ctx, with an error of show,
// or, unless Follow is set, after the last alert. It creates no consumer, so that it needs no right to create one.
func Run(ctx context.Context, js jetstream.JetStream, c Config, show func(schema.Alert) error) error {
	next, err := c.first(ctx, js)
	if err != nil {
		return err
	}
	shown := &seen{ids: map[string]bool{}}
	away := false
	for {
		try, cancel := context.WithTimeout(ctx, 10*time.Second)
		m, err := consumers.ReadNext(try, js, c.Stream, next, c.Subject())
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // Ctrl-C is how watching ends
		case err == nil:
			away, next = false, m.Sequence+1
			if err := c.show(m, shown, show); err != nil {
				return err
			}
			continue
		case errors.Is(err, jetstream.ErrMsgNotFound):
			if !c.Follow {
				return nil
			}
			away = false
		case !c.Follow || js.Conn().IsClosed():
			return fmt.Errorf("watch %s: %w", c.Stream, err)
		case !away:
			away = true
			c.Log.Warn("alerts cannot be read, trying again", "stream", c.Stream, "err", err)
		}
		backoff.Sleep(ctx, every)
	}
}

// first returns the sequence number of the first message to look at.
func (c Config) first(ctx context.Context, js jetstream.JetStream) (uint64, error) {
	stream, err := js.Stream(ctx, c.Stream)
	if err != nil {
		return 0, fmt.Errorf("stream of alerts %s: %w (does decuwatch serve run?)", c.Stream, err)
	}
	state := stream.CachedInfo().State
	first, end := max(state.FirstSeq, 1), state.LastSeq+1
	switch {
	case c.All:
		return first, nil
	case c.Since <= 0:
		return end, nil
	}
	from := time.Now().Add(-c.Since)
	for first < end { // messages are stored in order of time
		middle := first + (end-first)/2
		m, err := consumers.ReadNext(ctx, js, c.Stream, middle, ">")
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			end = middle
		case err != nil:
			return 0, fmt.Errorf("watch %s: %w", c.Stream, err)
		case m.Time.Before(from):
			first = m.Sequence + 1
		default:
			end = middle
		}
	}
	return first, nil
}

func (c Config) show(m consumers.Stored, shown *seen, show func(schema.Alert) error) error {
	a, err := schema.DecodeAlert(m.Payload)
	if err != nil {
		c.Log.Warn("a message of the stream is not an alert", "subject", m.Subject, "err", err)
		return nil
	}
	if c.selects(a) && shown.first(a.ID) {
		return show(a)
	}
	return nil
}

// seen remembers the last few thousand ids.
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
	if len(s.order) == most {
		delete(s.ids, s.order[0])
		s.order = s.order[1:]
	}
	s.ids[id] = true
	s.order = append(s.order, id)
	return true
}

var colours = map[schema.Severity]string{schema.SeverityWarn: "\x1b[33m", schema.SeverityCritical: "\x1b[1;31m"}

// Line returns an alert in one line for a terminal.
func Line(a schema.Alert, colour bool) string {
	severity := fmt.Sprintf("%-8s", a.Severity)
	if colour {
		severity = colours[a.Severity] + severity + "\x1b[0m"
	}
	saturated := ""
	if a.Saturated {
		saturated = ", saturated"
	}
	return fmt.Sprintf("%s  %s  %-14s %-16s %-12s %8.4g >= %-9.4g %s%s  %s",
		terminal.Time(a.FiredAt), severity, terminal.Printable(a.Model),
		terminal.Printable(a.ClassLabel), a.Measurement, a.Decided, a.Threshold, a.Reason, saturated,
		terminal.Printable(a.EventID))
}

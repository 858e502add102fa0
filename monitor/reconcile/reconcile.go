// Package reconcile holds the streams of events and alerts against Postgres: each acknowledged event has exactly one
// verdict, none was lost, and each alert is where it should be.
package reconcile

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Report is what both sides hold.
type Report struct {
	Messages    int `json:"messages"`     // of the stream of events
	Scores      int `json:"scores"`       // messages whose verdict is a score
	Skips       int `json:"skips"`        //
	DeadLetters int `json:"dead_letters"` //
	Repeats     int `json:"repeats"`      // messages that repeat an event, whose first verdict stands
	Waiting     int `json:"waiting"`      // without a verdict, and a worker will take them
	Orphaned    int `json:"orphaned"`     // without a verdict, and nobody takes them
	Missing     int `json:"missing"`      // acknowledged, without a verdict
	Several     int `json:"several"`      // with more than one verdict
	Lost        int `json:"lost"`         // gone from the stream, without a verdict

	Alerts        int `json:"alerts"`         // of Postgres
	Published     int `json:"published"`      // of them in the stream of alerts
	HeldBack      int `json:"held_back"`      // of them beyond their volume: stored, and counted by a summary
	OwedAlerts    int `json:"owed_alerts"`    // of them still in the outbox
	LostAlerts    int `json:"lost_alerts"`    // of them neither there nor owed
	UnknownAlerts int `json:"unknown_alerts"` // in the stream, unknown to Postgres

	Differences []string `json:"differences,omitempty"` // the first few, in words
}

// maxDifferences bounds the differences that are spelled out.
const maxDifferences = 20

func (r *Report) differ(format string, args ...any) {
	if len(r.Differences) < maxDifferences {
		r.Differences = append(r.Differences, fmt.Sprintf(format, args...))
	}
}

// Agrees reports whether every acknowledged event has exactly one verdict or will get it, none was lost, and every alert is
// where it should be.
func (r *Report) Agrees() bool {
	return r.Missing == 0 && r.Several == 0 && r.Orphaned == 0 && r.Lost == 0 && r.LostAlerts == 0 && r.UnknownAlerts == 0
}

// Options say what is compared.
type Options struct {
	JetStream jetstream.JetStream
	Store     *postgres.Store
	Events    string // stream of events
	Alerts    string // stream of alerts
	From      uint64 // losses of earlier messages are not reported: an operator knows them
	// Progress is called with the number of messages of the stream of events, then with how many more were read. May be nil.
	Progress func(total uint64, more int)
}

// quiet is how long a consumer may go without a sign of a worker that pulls from it, and patience how long is waited for
// such a sign.
const (
	quiet    = 70 * time.Second
	patience = 5 * time.Second
)

// Run compares. It terminates on any stream: it reads messages by sequence number, up to the last one at its start.
func Run(ctx context.Context, o Options) (*Report, error) {
	if o.Progress == nil {
		o.Progress = func(uint64, int) {}
	}
	r := &run{Options: o, report: &Report{}}
	if err := r.compareEvents(ctx); err != nil {
		return nil, fmt.Errorf("reconcile %s: %w", o.Events, err)
	}
	if err := r.compareAlerts(ctx); err != nil {
		return nil, fmt.Errorf("reconcile %s: %w", o.Alerts, err)
	}
	return r.report, nil
}

// run is one comparison.
type run struct {
	Options
	report *Report
	view   *consumers.View
	owners map[string]consumers.Ownership // by subject
}

func (r *run) compareEvents(ctx context.Context) error {
	// What is acknowledged now has its verdict already; what is acknowledged later may get it while this runs.
	var err error
	if r.view, err = consumers.ReadView(ctx, r.JetStream, r.Events); err != nil {
		return err
	}
	if len(r.view.Missing) > 0 {
		return fmt.Errorf("the server cannot tell the state of the consumers %q at the moment", r.view.Missing)
	}
	r.owners = map[string]consumers.Ownership{}
	r.Progress(r.view.State.Msgs, 0)
	from, err := r.accountedFrom(ctx)
	if err != nil {
		return err
	}
	if err := r.gone(ctx, from, max(r.view.State.FirstSeq, 1)-1); err != nil {
		return err
	}
	return readAll(ctx, r.JetStream, r.Events, r.view.State, func(messages []consumers.Stored, first, last uint64) error {
		r.Progress(r.view.State.Msgs, len(messages))
		r.report.Messages += len(messages)
		if err := r.messages(ctx, messages); err != nil {
			return err
		}
		for next := max(first, from); next <= last; { // gaps between the messages that were read
			gap := last
			for len(messages) > 0 && messages[0].Sequence < next {
				messages = messages[1:]
			}
			if len(messages) > 0 {
				gap = messages[0].Sequence - 1
			}
			if err := r.gone(ctx, next, gap); err != nil {
				return err
			}
			next = gap + 2
		}
		return nil
	})
}

// accountedFrom returns the sequence number from which the ledger accounts for each message.
func (r *run) accountedFrom(ctx context.Context) (uint64, error) {
	begin, known, err := r.Store.AccountedFrom(ctx, r.Events, r.view.Created)
	if err != nil {
		return 0, err
	}
	if !known { // no worker has seen this stream yet
		begin = r.view.State.FirstSeq
	}
	return max(begin, r.From, 1), nil
}

// goneChunk is how many sequence numbers are held against the ledger at once.
const goneChunk = 1_000_000

// gone counts the messages from <= sequence <= to, none of which is in the stream, that have no verdict.
func (r *run) gone(ctx context.Context, from, to uint64) error {
	for ; from <= to; from += goneChunk {
		end := min(to, from+goneChunk-1)
		ranges, err := r.Store.Unsettled(ctx, r.Events, r.view.Created, from, end)
		if err != nil {
			return err
		}
		for _, g := range ranges {
			r.report.Lost += int(g[1] - g[0] + 1) //nolint:gosec // within goneChunk
			if g[0] == g[1] {
				r.report.differ("message %d is gone from the stream and has no verdict", g[0])
			} else {
				r.report.differ("messages %d to %d are gone from the stream and have no verdict", g[0], g[1])
			}
		}
	}
	return nil
}

// messages counts messages and their verdicts.
func (r *run) messages(ctx context.Context, messages []consumers.Stored) error {
	if len(messages) == 0 {
		return nil
	}
	verdicts, err := r.Store.VerdictsBySequence(ctx, r.Events, messages[0].Sequence, messages[len(messages)-1].Sequence)
	if err != nil {
		return err
	}
	bySequence := map[uint64][]postgres.SequenceVerdict{}
	for _, v := range verdicts {
		bySequence[v.Sequence] = append(bySequence[v.Sequence], v)
	}
	var open []event // without a verdict of their own
	var ids []schema.Identity
	for _, m := range messages {
		if r.settled(m, bySequence[m.Sequence]) {
			continue
		}
		e := event{Stored: m, name: "not an event"}
		if ev, err := m.Decode(); err == nil {
			e.id, e.name = ev.Identity(), fmt.Sprintf("%s of %s", printable(ev.ID), printable(ev.Source))
			ids = append(ids, e.id)
		}
		open = append(open, e)
	}
	if len(open) == 0 {
		return nil
	}
	digests, err := r.Store.EventDigests(ctx, ids)
	if err != nil {
		return err
	}
	for _, e := range open {
		if digests[e.id] == e.Digest() {
			r.report.Repeats++
		} else if err := r.unsettled(ctx, e.Stored, e.name); err != nil {
			return err
		}
	}
	return nil
}

// event is a message with what it says of its event.
type event struct {
	consumers.Stored
	id   schema.Identity // zero if the message is not an event
	name string          // for people
}

// settled counts a message that has a verdict, and reports whether it has.
func (r *run) settled(m consumers.Stored, verdicts []postgres.SequenceVerdict) bool {
	digest := m.Digest()
	own := slices.DeleteFunc(verdicts, func(v postgres.SequenceVerdict) bool { return v.Digest != digest }) // of a stream that was made anew
	switch {
	case len(own) == 0:
		return false
	case len(own) > 1:
		r.report.Several++
		r.report.differ("message %d has %d verdicts", m.Sequence, len(own))
	case own[0].Outcome == schema.OutcomeScore:
		r.report.Scores++
	case own[0].Outcome == schema.OutcomeSkip:
		r.report.Skips++
	case own[0].Outcome == schema.OutcomeRepeat:
		r.report.Repeats++
	default:
		r.report.DeadLetters++
	}
	return true
}

// unsettled counts a message without a verdict by who will take it.
func (r *run) unsettled(ctx context.Context, m consumers.Stored, id string) error {
	owner, err := r.owner(ctx, m.Subject)
	if err != nil {
		return err
	}
	c := r.view.Consumers[consumers.Durable(strings.TrimPrefix(m.Subject, schema.SubjectGeneration("")))]
	switch {
	case owner == consumers.Owned && m.Sequence > r.view.Floor(c), owner == consumers.Unowned && r.view.Time.Sub(m.Time) < quiet:
		r.report.Waiting++
	case owner == consumers.Owned:
		r.report.Missing++
		r.report.differ("message %d on %s (%s) is acknowledged and has no verdict", m.Sequence, printable(m.Subject), id)
	case owner == consumers.Orphaned:
		r.report.Orphaned++
		r.report.differ("message %d on %s (%s) is orphaned: nobody pulls from the consumer %s", m.Sequence, printable(m.Subject), id, c.Name)
	default:
		r.report.Orphaned++
		r.report.differ("message %d on %s (%s) has no verdict, and its model has no consumer", m.Sequence, printable(m.Subject), id)
	}
	return nil
}

// owner says who takes a subject's events. Before it says that nobody does, it looks again for a while.
func (r *run) owner(ctx context.Context, subject string) (consumers.Ownership, error) {
	if o, known := r.owners[subject]; known {
		return o, nil
	}
	owner, _ := r.view.Owner(subject, quiet)
	for end := time.Now().Add(patience); owner == consumers.Orphaned && time.Now().Before(end); {
		select {
		case <-time.After(patience / 10):
		case <-ctx.Done():
			return owner, context.Cause(ctx)
		}
		later, err := consumers.ReadView(ctx, r.JetStream, r.Events)
		if err != nil {
			return owner, err
		}
		owner, _ = later.Owner(subject, quiet)
	}
	r.owners[subject] = owner
	return owner, nil
}

// printable returns s with anything that a terminal would not print as a question mark.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

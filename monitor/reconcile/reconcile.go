// Package reconcile compares the streams of events and alerts with Postgres. It checks that each acknowledged event has
// exactly one verdict, that no event was lost, and that each alert is where it should be.
package reconcile

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Report counts what the streams and Postgres contain.
type Report struct {
	Messages    int `json:"messages"`     // in the stream of events
	Scores      int `json:"scores"`       // messages whose verdict is a score
	Skips       int `json:"skips"`        //
	DeadLetters int `json:"dead_letters"` //
	Repeats     int `json:"repeats"`      // messages that repeat an event; the first verdict stands
	Waiting     int `json:"waiting"`      // without a verdict; a worker will take them
	Orphaned    int `json:"orphaned"`     // without a verdict; no worker will take them
	Missing     int `json:"missing"`      // acknowledged without a verdict
	Several     int `json:"several"`      // with more than one verdict
	Lost        int `json:"lost"`         // gone from the stream without a verdict

	Alerts        int `json:"alerts"`         // in Postgres
	Published     int `json:"published"`      // alerts of Postgres that are in the stream
	HeldBack      int `json:"held_back"`      // alerts beyond the budget: stored, and counted by a summary
	OwedAlerts    int `json:"owed_alerts"`    // alerts that are still in the outbox
	LostAlerts    int `json:"lost_alerts"`    // alerts that are neither in the stream nor in the outbox
	UnknownAlerts int `json:"unknown_alerts"` // alerts of the stream that Postgres does not know

	Differences []string `json:"differences,omitempty"` // the first maxDifferences, in words
}

// maxDifferences bounds the differences that a report describes.
const maxDifferences = 20

func (r *Report) differ(format string, args ...any) {
	if len(r.Differences) < maxDifferences {
		r.Differences = append(r.Differences, fmt.Sprintf(format, args...))
	}
}

// Agrees reports whether every acknowledged event has, or will get, exactly one verdict, no event was lost, and every
// alert is where it should be.
func (r *Report) Agrees() bool {
	return r.Missing == 0 && r.Several == 0 && r.Orphaned == 0 && r.Lost == 0 && r.LostAlerts == 0 &&
		r.UnknownAlerts == 0
}

// Options say what to compare.
type Options struct {
	JetStream jetstream.JetStream
	Store     *postgres.Store
	Events    string // stream of events
	Alerts    string // stream of alerts
	From      uint64 // first sequence number whose loss is reported; earlier losses are known to the operator
	// Progress is called with the number of messages in the stream of events, and how many more were read. May be nil.
	Progress func(total uint64, more int)
}

const (
	quiet    = 70 * time.Second // a consumer without a sign of a worker for this long is orphaned
	patience = 5 * time.Second  // how long Run waits for such a sign
)

// Run compares. It terminates on any stream, because it reads up to the message that was the last when it started.
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
	// A message that is acknowledged by now has its verdict already. Later ones may get it while this runs.
	var err error
	if r.view, err = consumers.ReadView(ctx, r.JetStream, r.Events); err != nil {
		return err
	}
	if len(r.view.Missing) > 0 {
		return fmt.Errorf("the server does not know the state of the consumers %q at the moment", r.view.Missing)
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
	read := func(messages []consumers.Stored, first, last uint64) error {
		r.Progress(r.view.State.Msgs, len(messages))
		r.report.Messages += len(messages)
		if err := r.messages(ctx, messages); err != nil {
			return err
		}
		for next := max(first, from); next <= last; { // gaps between the messages
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
	}
	return readAll(ctx, r.JetStream, r.Events, r.view.State, read)
}

// accountedFrom returns the first sequence number for which the ledger accounts.
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

// goneChunk is how many sequence numbers are compared with the ledger at once.
const goneChunk = 1_000_000

// gone counts the messages from <= sequence <= to that have no verdict. None of them is in the stream any more.
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
	bySequence, err := r.verdicts(ctx, messages[0].Sequence, messages[len(messages)-1].Sequence)
	if err != nil {
		return err
	}
	var open []event
	var ids []schema.Identity
	for _, m := range messages {
		if r.settled(m, bySequence[m.Sequence]) {
			continue
		}
		e := event{Stored: m, name: "not an event"}
		if ev, err := m.Decode(); err == nil {
			e.id, e.name = ev.Identity(), fmt.Sprintf("%s of %s", terminal.Printable(ev.ID), terminal.Printable(ev.Source))
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
		if digests[e.id] != e.Digest() {
			if err := r.unsettled(ctx, e.Stored, e.name); err != nil {
				return err
			}
			continue
		}
		// The event's verdict is this message's own if it was written after the verdicts were read.
		later, err := r.verdicts(ctx, e.Sequence, e.Sequence)
		if err != nil {
			return err
		}
		if !r.settled(e.Stored, later[e.Sequence]) {
			r.report.Repeats++
		}
	}
	return nil
}

// verdicts returns the verdicts of messages by their sequence numbers, from first to last.
func (r *run) verdicts(ctx context.Context, first, last uint64) (map[uint64][]postgres.SequenceVerdict, error) {
	verdicts, err := r.Store.VerdictsBySequence(ctx, r.Events, first, last)
	if err != nil {
		return nil, err
	}
	bySequence := map[uint64][]postgres.SequenceVerdict{}
	for _, v := range verdicts {
		bySequence[v.Sequence] = append(bySequence[v.Sequence], v)
	}
	return bySequence, nil
}

// event is a message that has no verdict of its own.
type event struct {
	consumers.Stored
	id   schema.Identity // zero if the message is not an event
	name string          // for people
}

// settled reports whether a message has a verdict, and counts it.
func (r *run) settled(m consumers.Stored, verdicts []postgres.SequenceVerdict) bool {
	digest := m.Digest()
	// Another digest belongs to an earlier stream of this name.
	own := slices.DeleteFunc(verdicts, func(v postgres.SequenceVerdict) bool { return v.Digest != digest })
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
	case owner == consumers.Owned && m.Sequence > r.view.Floor(c),
		owner == consumers.Unowned && r.view.Time.Sub(m.Time) < quiet:
		r.report.Waiting++
	case owner == consumers.Owned:
		r.report.Missing++
		r.report.differ("message %d on %s (%s) is acknowledged and has no verdict",
			m.Sequence, terminal.Printable(m.Subject), id)
	case owner == consumers.Orphaned:
		r.report.Orphaned++
		r.report.differ("message %d on %s (%s) is orphaned: nobody pulls from the consumer %s",
			m.Sequence, terminal.Printable(m.Subject), id, c.Name)
	default:
		r.report.Orphaned++
		r.report.differ("message %d on %s (%s) has no verdict, and its model has no consumer",
			m.Sequence, terminal.Printable(m.Subject), id)
	}
	return nil
}

// owner says who takes a subject's events. Before it says that nobody does, it asks again for a while.
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

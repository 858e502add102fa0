package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/decuwatch/decuwatch/schema"
)

// Recorded is the verdict that stands on an event.
type Recorded struct {
	First    bool // this call wrote it; false if an earlier one stands
	Outcome  schema.Outcome
	Reason   string        // of a skip; kind of a dead letter
	Score    *schema.Score // nil if the outcome is another, or the score was dropped by retention
	AlertIDs []string      // of the score's alerts

	// Withheld says, if First, why alerts are stored but not sent, by their ids.
	Withheld map[string]schema.Dispatch
}

// Record commits a verdict and returns when it is durable. Calls that run at the same time share one transaction.
//
// The ledger claims source, id and model for the verdict on an event. A dead letter claims them only if its message
// came on the subject of the event's own model, is not merely invalid, and was taken by a worker. So a producer cannot
// settle the events of another, may send an event again, corrected, and may resend events that no worker took. A
// message that repeats an event is recorded as settled.
//
// The first verdict on an event stands: if the ledger holds one for the same source, id, model and digest, nothing
// is written and the first is returned, with First false. If it holds one of another digest, an identifier was used
// for two different events of one model: a score or a skip is refused with *schema.Invalid on the field id (the caller
// makes a dead letter of it), and a dead letter is written under its stream, sequence and digest. A message that could
// not be decoded has that key only.
//
// Other errors: *schema.Invalid on the field time if no partition can hold it; ErrNotFinite; ErrClosed; the
// context's error, with which the verdict may still be written; a database error, with which it may have been
// written if the answer to the commit was lost. Each is safe to try again.
func (s *Store) Record(ctx context.Context, v schema.Verdict) (Recorded, error) {
	c, err := s.prepare(ctx, v)
	if err != nil {
		return Recorded{}, fmt.Errorf("record verdict: %w", err)
	}
	select {
	case s.queue <- c:
	case <-ctx.Done():
		return Recorded{}, fmt.Errorf("record verdict: wait for a transaction: %w", context.Cause(ctx))
	case <-s.closing:
		return Recorded{}, fmt.Errorf("record verdict: %w", ErrClosed)
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return Recorded{}, fmt.Errorf("record verdict: wait for the commit: %w", context.Cause(ctx))
	}
	if c.err != nil {
		return Recorded{}, fmt.Errorf("record verdict: %w", c.err)
	}
	if c.won {
		for _, a := range c.alerts {
			if a.Delivery != schema.DispatchOwed {
				c.result.Withheld[a.ID] = a.Delivery
			}
		}
		return c.result, nil
	}
	first, err := s.standing(ctx, *c.stands)
	if err != nil {
		return Recorded{}, fmt.Errorf("record verdict: %w", err)
	}
	return first, nil
}

// DeadLetter is Record of a verdict whose DeadLetter is set.
func (s *Store) DeadLetter(ctx context.Context, v schema.Verdict) error {
	if v.DeadLetter == nil {
		return errors.New("record dead letter: the verdict is not a dead letter")
	}
	_, err := s.Record(ctx, v)
	return err
}

// call is one verdict on its way through a transaction.
type call struct {
	event      *eventRow // nil if the message could not be decoded
	score      *scoreRow
	skip       *skipRow
	deadLetter *deadLetterRow
	alerts     []alertRow
	outbox     []outboxRow
	review     *reviewRow

	done   chan struct{} // closed when what follows is set
	result Recorded      // if this verdict stands
	won    bool          // this verdict was written
	canary bool          // if won: the event is a canary
	stands *eventRow     // the earlier verdict that stands, if any
	err    error
}

// key orders calls, so that transactions take locks in one order and cannot wait for each other in a circle.
func (c *call) key() string {
	if c.event != nil {
		return "e" + c.event.Source + "\n" + c.event.EventID + "\n" + c.event.Model
	}
	return fmt.Sprintf("m%s\n%020d\n%s", c.deadLetter.Stream, c.deadLetter.Sequence, c.deadLetter.Digest)
}

// claims reports whether the verdict takes the identity of its event.
func (c *call) claims() bool {
	return c.event != nil && (c.deadLetter == nil || !slices.Contains(untaken, c.deadLetter.Kind))
}

// prepare checks a verdict and makes its rows, in the caller's goroutine.
func (s *Store) prepare(ctx context.Context, v schema.Verdict) (*call, error) {
	c := &call{done: make(chan struct{})}
	set := 0
	var event *schema.Event
	if v.Score != nil {
		set++
		event = &v.Score.Event
		if err := s.prepareScore(ctx, c, v); err != nil {
			return nil, err
		}
	}
	if v.Skip != nil {
		set++
		event = &v.Skip.Event
		c.skip = &skipRow{
			Source: event.Source, EventID: event.ID, EventTime: event.Time, Model: event.Data.Model,
			Class: event.Data.Class.String(), Reason: v.Skip.Reason, Detail: clean(v.Skip.Detail),
			Labels: labels(event.Data.Labels), InclusionProbability: v.Skip.InclusionProbability,
		}
		c.result = Recorded{First: true, Outcome: schema.OutcomeSkip, Reason: string(v.Skip.Reason)}
	}
	if v.DeadLetter != nil {
		set++
		if ofItsModel(v.DeadLetter) {
			event = v.DeadLetter.Event
		}
		c.deadLetter = newDeadLetterRow(v)
		c.result = Recorded{First: true, Outcome: schema.OutcomeDeadLetter, Reason: string(v.DeadLetter.Kind)}
	}
	if set != 1 {
		return nil, fmt.Errorf("exactly one of Score, Skip and DeadLetter must be set, %d are", set)
	}
	if event != nil {
		c.event = &eventRow{
			Source: event.Source, EventID: event.ID, Digest: v.Delivery.Digest, Outcome: c.result.Outcome,
			Reason: c.result.Reason, EventTime: event.Time, Model: event.Data.Model, Stream: v.Delivery.Stream,
			Sequence: int64(v.Delivery.Sequence), Delivered: v.Delivery.Delivered,
		}
		if c.score != nil {
			c.event.EnsembleDigest = &c.score.EnsembleDigest
		}
	}
	return c, nil
}

// prepareScore makes the rows of a score, its alerts and its review.
func (s *Store) prepareScore(ctx context.Context, c *call, v schema.Verdict) error {
	if err := checkScore(v.Score); err != nil {
		return err
	}
	row := newScoreRow(v.Score)
	c.score = &row
	c.result = Recorded{
		First: true, Outcome: schema.OutcomeScore, Score: v.Score, Withheld: map[string]schema.Dispatch{},
	}
	for _, a := range v.Alerts {
		if err := c.addAlert(a, s.config.Sinks); err != nil {
			return err
		}
	}
	if v.Sampled || len(v.Alerts) > 0 {
		review := newReviewRow(v.Score, v.Alerts)
		c.review = &review
	}
	return s.ensureMonth(ctx, row.EventTime)
}

// untaken are the kinds of dead letters of messages that no worker took. They say nothing about the event, so they do
// not claim it: if it is sent again when a worker scores its model, it gets its verdict.
var untaken = []schema.DeadLetterKind{schema.KindUnknownModel, schema.KindOrphaned}

// ofItsModel reports whether a dead letter is about its event, not only about its message. Whoever may publish on one
// subject must not settle the events of another, so only a message on the subject of its own model is.
func ofItsModel(l *schema.DeadLetter) bool {
	return l.Event != nil && l.Kind != schema.KindInvalid && (l.Subject == "" ||
		l.Subject == schema.SubjectGeneration(l.Event.Data.Model))
}

// addAlert adds an alert, and what is owed to the sinks.
func (c *call) addAlert(a schema.Alert, sinks []schema.Sink) error {
	if err := checkAlert(a); err != nil {
		return err
	}
	outbox, err := outboxRows(a, sinks...)
	if err != nil {
		return err
	}
	c.alerts = append(c.alerts, newAlertRow(a))
	c.result.AlertIDs = append(c.result.AlertIDs, a.ID)
	c.outbox = append(c.outbox, outbox...)
	return nil
}

func newDeadLetterRow(v schema.Verdict) *deadLetterRow {
	l := v.DeadLetter
	row := &deadLetterRow{
		Stream: v.Delivery.Stream, Sequence: int64(v.Delivery.Sequence), Digest: v.Delivery.Digest,
		Delivered: v.Delivery.Delivered, Subject: clean(l.Subject),
		Payload: l.Payload[:min(len(l.Payload), schema.MaxPayload)],
		Kind:    l.Kind, Field: clean(l.Field), Reason: clean(l.Reason),
		PayloadSize: len(l.Payload), PayloadState: payloadWhole,
	}
	if len(l.Payload) > len(row.Payload) {
		row.PayloadState = payloadCut
	}
	if l.Event != nil {
		row.Source, row.EventID, row.EventTime, row.Model = &l.Event.Source, &l.Event.ID, &l.Event.Time, &l.Event.Data.Model
	} else {
		row.Source, row.EventID = optional(clean(l.Source)), optional(clean(l.EventID))
	}
	if model, ok := strings.CutPrefix(row.Subject, schema.SubjectGeneration("")); row.Model == nil && ok && model != "" {
		row.Model = &model
	}
	return row
}

// clean replaces what PostgreSQL refuses in text: NUL and broken UTF-8.
func clean(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

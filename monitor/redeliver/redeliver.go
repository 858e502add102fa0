// Package redeliver publishes events again that became dead letters, so that they are scored. An operator asks for it:
// the dead letter stays as history, the operator's name is recorded, and the event gets a new verdict under a new
// message.
package redeliver

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Kinds returns the kinds of dead letters that can be redelivered. The other kinds would fail in the same way again.
func Kinds() []schema.DeadLetterKind {
	return []schema.DeadLetterKind{schema.KindOrphaned, schema.KindUnknownModel, schema.KindGivenUp, schema.KindFailed}
}

// Result is what became of one dead letter.
type Result struct {
	DeadLetter postgres.StoredDeadLetter
	Refused    string // why its message cannot be published again; "" if it can
	Sequence   uint64 // of the message that was published; 0 if Options.Apply is false
}

// String returns the result in one line for a terminal.
func (r Result) String() string {
	what := "can be published again"
	switch {
	case r.Refused != "":
		what = "CANNOT be published again: " + r.Refused
	case r.Sequence > 0:
		what = fmt.Sprintf("was published again as message %d", r.Sequence)
	}
	l := r.DeadLetter
	return fmt.Sprintf("%d\t%s\t%s\tmessage %d\t%s %s\t%s", l.ID, l.Kind, terminal.Printable(l.Model), l.Sequence,
		terminal.Printable(l.Source), terminal.Printable(l.EventID), what)
}

// Options say what to redeliver.
type Options struct {
	JetStream jetstream.JetStream
	Store     *postgres.Store
	Query     postgres.DeadLetterQuery
	By        string // who asks. Required if Apply is set
	Apply     bool   // publish the messages; otherwise only list them
}

// Run calls done with each dead letter that the query finds, in order. An interrupted run can be repeated: it publishes
// no dead letter twice.
func Run(ctx context.Context, o Options, done func(Result) error) error {
	return o.Store.EachDeadLetter(ctx, o.Query, func(l postgres.StoredDeadLetter) error {
		msg, refused, err := message(ctx, o.JetStream, l)
		if err != nil {
			return err
		}
		r := Result{DeadLetter: l, Refused: refused}
		if o.Apply && refused == "" {
			if r.Sequence, err = publish(ctx, o, l, msg); err != nil {
				return fmt.Errorf("redeliver dead letter %d: %w", l.ID, err)
			}
		}
		return done(r)
	})
}

// publish allows the event a new verdict, then publishes its message. If it fails in between, the next run publishes.
func publish(ctx context.Context, o Options, l postgres.StoredDeadLetter, msg *nats.Msg) (uint64, error) {
	id, err := o.Store.Redeliver(ctx, l.ID, o.By)
	if err != nil {
		return 0, err
	}
	// There is no message id: a producer could use the same id first, and the stream would drop this message as a
	// duplicate. If a failed run has published the message already, this one repeats the event, which does no harm.
	ack, err := o.JetStream.PublishMsg(ctx, msg, jetstream.WithExpectStream(l.Stream))
	if err != nil {
		return 0, err
	}
	return ack.Sequence, o.Store.Redelivered(ctx, id, ack.Sequence)
}

// message returns the message of a dead letter as its producer sent it: from the stream, or from the dead letter's
// payload if the message had no headers of an event. Refused says why the message cannot be returned.
func message(
	ctx context.Context, js jetstream.JetStream, l postgres.StoredDeadLetter,
) (msg *nats.Msg, refused string, err error) {
	if !strings.HasPrefix(l.Subject, schema.SubjectGeneration("")) {
		return nil, fmt.Sprintf("its subject is %q, must begin with %s", l.Subject, schema.SubjectGeneration("")), nil
	}
	stored, err := consumers.ReadStored(ctx, js, l.Stream, l.Sequence)
	if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, "", err
	}
	if err == nil && stored.Digest() == l.Digest {
		return &nats.Msg{Subject: l.Subject, Header: own(stored.Header), Data: stored.Payload}, "", nil
	}
	if l.PayloadState != "whole" {
		return nil, fmt.Sprintf("it has left the stream, and its payload is %s", l.PayloadState), nil
	}
	for _, header := range []nats.Header{nil, {"Content-Type": {"application/cloudevents+json"}}} {
		if schema.Digest(header, l.Payload) == l.Digest {
			return &nats.Msg{Subject: l.Subject, Header: own(header), Data: l.Payload}, "", nil
		}
	}
	return nil, "it has left the stream, and a dead letter keeps no headers", nil
}

// own returns the headers that belong to the event, without those that instruct the server.
func own(header map[string][]string) nats.Header {
	kept := nats.Header{}
	for name, values := range header {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "ce-") || lower == "content-type" {
			kept[name] = values
		}
	}
	return kept
}

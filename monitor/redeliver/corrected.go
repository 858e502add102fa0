package redeliver

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// ErrSettled is returned by Correct if the identity of the corrected event has a verdict, which stands.
var ErrSettled = errors.New("its source, id and model have a verdict already, which stands; give it a new id")

// Correct publishes a corrected event in place of a dead letter's message, and returns the sequence number of its
// message. If the dead letter claimed the event's identity, the corrected event needs a new id, else the error is
// ErrSettled. Without apply it only checks, and returns 0.
func Correct(ctx context.Context, js jetstream.JetStream, store *postgres.Store, of postgres.DeadLetter, e schema.Event,
	apply bool,
) (uint64, error) {
	header, payload, err := schema.Encode(e)
	if err != nil {
		return 0, err
	}
	_, known, err := store.Lookup(ctx, e.Identity(), schema.Digest(header, payload))
	var invalid *schema.Invalid
	switch {
	case known || errors.As(err, &invalid):
		return 0, fmt.Errorf("event %s of %s: %w", e.ID, e.Source, ErrSettled)
	case err != nil || !apply:
		return 0, err
	}
	// Within two minutes the stream would take its message id for a repetition of the broken message.
	delete(header, schema.HeaderMessageID)
	msg := &nats.Msg{Subject: schema.SubjectGeneration(e.Data.Model), Header: header, Data: payload}
	ack, err := js.PublishMsg(ctx, msg, jetstream.WithExpectStream(of.Stream))
	if err != nil {
		return 0, fmt.Errorf("publish the corrected event of dead letter %d: %w", of.ID, err)
	}
	return ack.Sequence, nil
}

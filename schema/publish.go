package schema

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Publisher is the part of jetstream.JetStream that Publish needs.
type Publisher interface {
	PublishMsg(ctx context.Context, msg *nats.Msg, opts ...jetstream.PublishOpt) (*jetstream.PubAck, error)
}

// Publish publishes one generation event and returns when JetStream has stored it. The event's source, model and id become
// its Nats-Msg-Id, so that publishing again after an error stores it once (PubAck.Duplicate tells) as long as the
// stream's duplicate window lasts; beyond that the monitor itself keeps the first verdict on an event.
//
// The error is an *Invalid where the event breaks the format; nothing was sent then.
func Publish(ctx context.Context, js Publisher, e Event) (*jetstream.PubAck, error) {
	header, payload, err := Encode(e)
	if err != nil {
		return nil, err
	}
	msg := &nats.Msg{Subject: SubjectGeneration(e.Data.Model), Header: header, Data: payload}
	ack, err := js.PublishMsg(ctx, msg)
	if err != nil {
		return nil, fmt.Errorf("publish event %s: %w", e.ID, err)
	}
	return ack, nil
}

package schema

import (
	"context"
	"encoding/json"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
)

// NewEvent returns an event of the current time with a new id.
func NewEvent(source string, data Generation) Event {
	return Event{
		Source: source, ID: uuid.Must(uuid.NewV7()).String(), Time: time.Now().UTC().Truncate(time.Microsecond), Data: data,
	}
}

// DecodeLine reads one event of a file. The line is a CloudEvent in structured mode, or the data alone. The data gets
// a new id, the current time and the given source. It also gets the given model, unless it names one itself or model
// is "".
func DecodeLine(line []byte, source, model string) (Event, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(line, &fields); err != nil {
		return Event{}, fmt.Errorf("not a JSON object: %w", err)
	}
	if _, whole := fields["specversion"]; whole {
		return Decode(nil, line)
	}
	if _, given := fields["model"]; !given && model != "" {
		fields["model"], _ = json.Marshal(model) // a string is always JSON
	}
	// The decoder checks the data's bounds and unknown fields.
	e := NewEvent(source, Generation{})
	payload, err := json.Marshal(structured{
		SpecVersion: "1.0", Type: TypeGenerationRequested, Source: e.Source, ID: e.ID, Time: formatTime(e.Time),
		DataContentType: "application/json", Data: fields,
	})
	if err != nil {
		return Event{}, err
	}
	return Decode(nil, payload)
}

// Publisher is the part of jetstream.JetStream that Publish needs.
type Publisher interface {
	PublishMsg(ctx context.Context, msg *nats.Msg, opts ...jetstream.PublishOpt) (*jetstream.PubAck, error)
}

// Publish publishes one generation event and returns when JetStream has stored it. It is safe to publish an event
// again after an error. Within the stream's duplicate window JetStream stores it once and sets PubAck.Duplicate,
// because the event's source, model and id are its Nats-Msg-Id. After that the monitor keeps the first verdict on an
// event.
//
// If the event breaks the format, the error is an *Invalid and nothing is sent.
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

// PublishAll publishes events, at most concurrency at a time, and calls done after each. It returns how many the
// stream has now, and how many of them were there before. It stops at the first error.
func PublishAll(
	ctx context.Context, js Publisher, events []Event, concurrency int, done func(),
) (stored, repeated int64, err error) {
	var all, again atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(1, concurrency))
	for _, e := range events {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			ack, err := Publish(ctx, js, e)
			if err != nil {
				return err
			}
			all.Add(1)
			if ack.Duplicate {
				again.Add(1)
			}
			done()
			return nil
		})
	}
	err = group.Wait()
	if err == nil && all.Load() < int64(len(events)) {
		err = context.Cause(ctx)
	}
	return all.Load(), again.Load(), err
}

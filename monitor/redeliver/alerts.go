package redeliver

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Unpublished returns the ids of the messages that were published to the stream of alerts and that it does not have.
// Messages older than the stream's maximum age are left out. If the stream is gone, its maximum age was maxAge.
func Unpublished(
	ctx context.Context, js jetstream.JetStream, store *postgres.Store, stream string, maxAge time.Duration,
) ([]string, error) {
	switch s, err := js.Stream(ctx, stream); {
	case errors.Is(err, jetstream.ErrStreamNotFound):
	case err != nil:
		return nil, err
	default:
		maxAge = s.CachedInfo().Config.MaxAge
	}
	sent, err := store.Sent(ctx, maxAge) // before reading the stream: what is published meanwhile is there
	if err != nil {
		return nil, err
	}
	there := map[string]bool{}
	for next := uint64(1); ; {
		m, err := consumers.ReadNext(ctx, js, stream, next, ">")
		var refusal *jetstream.APIError
		if errors.Is(err, jetstream.ErrMsgNotFound) ||
			errors.As(err, &refusal) && refusal.ErrorCode == jetstream.JSErrCodeStreamNotFound {
			break
		}
		if err != nil {
			return nil, err
		}
		there[nats.Header(m.Header).Get(jetstream.MsgIDHeader)] = true
		next = m.Sequence + 1
	}
	return slices.DeleteFunc(sent, func(id string) bool { return there[id] }), nil
}

// Republish puts messages that Unpublished returned into the outbox again, under the same ids.
func Republish(ctx context.Context, store *postgres.Store, ids []string) error {
	const atOnce = 1000
	for some := range slices.Chunk(ids, atOnce) {
		if err := store.OweAgain(ctx, some); err != nil {
			return err
		}
	}
	return nil
}

package consumers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/backoff"
)

const (
	askTimeout = 5 * time.Second  // for one answer
	askFor     = 20 * time.Second // no request is sent again after this time, which is longer than an election takes
)

// answer is the part that all answers of JetStream's API share.
type answer struct {
	Refusal *jetstream.APIError `json:"error"`
}

func (a answer) refusal() *jetstream.APIError { return a.Refusal }

// ask sends a request to JetStream's API and decodes the answer into the value that to points to. The request must be
// idempotent: it is sent again if it gets no answer, or if a group has no leader for a moment. If the server refuses
// the request, the error is a *[jetstream.APIError].
func ask(
	ctx context.Context, js jetstream.JetStream, api string, request []byte,
	to interface{ refusal() *jetstream.APIError },
) error {
	return withRetry(ctx, func(ctx context.Context) error {
		reply, err := js.Conn().RequestWithContext(ctx, jetstream.DefaultAPIPrefix+api, request)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(reply.Data, to); err != nil {
			return err
		}
		if refusal := to.refusal(); refusal != nil {
			return refusal
		}
		return nil
	})
}

// withRetry calls f, each time with askTimeout, until it succeeds, is refused, or askFor has passed.
func withRetry(ctx context.Context, f func(ctx context.Context) error) (err error) {
	retry := backoff.Backoff{Min: 100 * time.Millisecond, Max: time.Second}
	for start := time.Now(); ; {
		try, cancel := context.WithTimeoutCause(ctx, askTimeout, fmt.Errorf("no answer after %s", askTimeout))
		err = f(try)
		if err != nil && try.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(try), err)
		}
		cancel()
		if err == nil || ctx.Err() != nil || refused(err) || time.Since(start) > askFor {
			return err
		}
		retry.Wait(ctx)
	}
}

// refused reports whether err is an answer of the server that it would give again.
func refused(err error) bool {
	var refusal jetstream.JetStreamError
	return errors.As(err, &refusal) && refusal.APIError() != nil &&
		refusal.APIError().Code != http.StatusServiceUnavailable
}

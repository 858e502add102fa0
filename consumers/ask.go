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
	askFor     = 20 * time.Second // after which nothing is asked again; longer than an election takes
)

// answer is what JetStream's API answers: a refusal, or what embeds this.
type answer struct {
	Refusal *jetstream.APIError `json:"error"`
}

func (a answer) refusal() *jetstream.APIError { return a.Refusal }

// ask sends a request to JetStream's API and decodes the answer into what to points to. The request must be one that can be
// sent twice: a request or its answer may be lost, and a group may have no leader for a moment, so that it is sent again a
// few times. A refusal is an error, a *[jetstream.APIError].
func ask(ctx context.Context, js jetstream.JetStream, api string, request []byte, to interface{ refusal() *jetstream.APIError }) error {
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

// again calls f until it succeeds or is refused, each time with askTimeout, until askFor has passed.
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

// refused reports whether an error is the server's answer, and would be its answer again.
func refused(err error) bool {
	var refusal jetstream.JetStreamError
	return errors.As(err, &refusal) && refusal.APIError() != nil && refusal.APIError().Code != http.StatusServiceUnavailable
}

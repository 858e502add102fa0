package consumers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

// Codes of errors with which JetStream refuses a stream because of its size.
const (
	codeAccountLimits   jetstream.ErrorCode = 10002
	codeStorageExceeded jetstream.ErrorCode = 10047
	codeNoPeers         jetstream.ErrorCode = 10005 // of a cluster, for this and for other reasons
)

// NoRoom reports whether err says that a new stream would be larger than what the server, or the account, has left.
// [Runner.Run] returns such an error, because only an operator can help.
func NoRoom(err error) bool {
	var refusal *jetstream.APIError
	if !errors.As(err, &refusal) {
		return false
	}
	switch refusal.ErrorCode {
	case codeAccountLimits, codeStorageExceeded:
		return true
	case codeNoPeers:
		return strings.Contains(refusal.Description, "insufficient storage")
	}
	return false
}

// subjectPrefix begins each subject of generation events. The model's name follows.
var subjectPrefix = schema.SubjectGeneration("")

// Durable returns the name of the durable consumer of a model.
func Durable(model string) string { return durablePrefix + model }

const (
	durablePrefix = "decuwatch-"

	durableTerminated = "terminated-decuwatch" // cannot be the name of a model's consumer
	durableRetired    = "unowned-decuwatch"    // of earlier versions; nobody pulls from it
)

// maxConsumers bounds the consumers of a new stream: one for each model, and some for people.
const maxConsumers = 1024

// AdvisoryStream returns the name of the stream of the server's advisories about the given stream.
func AdvisoryStream(stream string) string { return stream + "_ADVISORIES" }

// EnsureStream creates the stream of generation events if it does not exist. The stream is on disk and keeps messages
// by age. It refuses messages above 64 KiB, refuses new messages when it is full, and does not let anybody delete
// single messages.
//
// A stream that exists is left as its operator made it. If its settings can erase, replace, expire or add messages, the
// error is [ErrStreamConfig].
func EnsureStream(ctx context.Context, js jetstream.JetStream, cfg StreamConfig) (jetstream.Stream, error) {
	cfg = settings.WithDefaults(cfg)
	stream, err := js.Stream(ctx, cfg.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = js.CreateStream(ctx, jetstream.StreamConfig{
			Name:        cfg.Name,
			Description: "Generation events for decuwatch, CloudEvents of type " + schema.TypeGenerationRequested,
			Subjects:    []string{subjectPrefix + ">"},
			Storage:     jetstream.FileStorage,
			Retention:   jetstream.LimitsPolicy,
			Discard:     jetstream.DiscardNew,
			MaxAge:      cfg.MaxAge,
			MaxBytes:    cfg.MaxBytes,
			MaxMsgSize:  schema.MaxPayload,
			Replicas:    cfg.Replicas,
			Duplicates:  min(2*time.Minute, cfg.MaxAge),

			MaxConsumers: maxConsumers,
			DenyDelete:   true,
		})
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another worker was first
			stream, err = js.Stream(ctx, cfg.Name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ensure stream %s: %w", cfg.Name, err)
	}
	return stream, checkSettings(stream.CachedInfo().Config, eventSettings)
}

// ensureConsumer creates or updates a durable consumer of the stream.
func (r *Runner) ensureConsumer(ctx context.Context, c jetstream.ConsumerConfig) (source, error) {
	stream, err := EnsureStream(ctx, r.js, r.cfg.Stream)
	if err != nil {
		return nil, err
	}
	if err := r.cfg.checkStream(stream.CachedInfo().Config); err != nil {
		return nil, err
	}
	if _, err := stream.CreateOrUpdateConsumer(ctx, c); err != nil {
		return nil, fmt.Errorf("ensure consumer %s: %w", c.Durable, err)
	}
	return r.source(r.cfg.Stream.Name, c.Durable), nil
}

// source returns the source of a durable consumer's messages.
func (r *Runner) source(stream, durable string) source {
	return &puller{nc: r.js.Conn(), stream: stream, consumer: durable, expiry: r.cfg.PullExpiry, log: r.log}
}

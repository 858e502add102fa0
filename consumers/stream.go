package consumers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// ErrStreamConfig is returned by [EnsureStream] and [Run] where a stream exists whose settings would lose events. Its
// text names the setting.
var ErrStreamConfig = errors.New("consumers: the stream's settings would lose events")

// subjectPrefix begins each subject of generation events; the model's name follows.
var subjectPrefix = schema.SubjectGeneration("")

// Durable returns the name of the durable consumer of a model.
func Durable(model string) string { return durablePrefix + model }

const (
	durablePrefix = "decuwatch-"

	durableUnowned    = "unowned-decuwatch" // cannot be the name of a model's consumer
	durableTerminated = "terminated-decuwatch"
)

// AdvisoryStream returns the name of the stream that keeps the server's advisories about the given stream.
func AdvisoryStream(stream string) string { return stream + "_ADVISORIES" }

// EnsureStream creates the stream of generation events where it does not exist: on disk, kept by age and never removed
// by consumption, refusing new messages rather than dropping old ones when full, messages of at most 64 KiB. A stream
// that exists is left as its operator made it, as long as no acknowledged event can be lost by its settings; else the
// error is [ErrStreamConfig].
func EnsureStream(ctx context.Context, js jetstream.JetStream, cfg Config) (jetstream.Stream, error) {
	cfg = cfg.WithDefaults()
	stream, err := js.Stream(ctx, cfg.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = js.CreateStream(ctx, jetstream.StreamConfig{
			Name:        cfg.Stream,
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
		})
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another worker was first
			stream, err = js.Stream(ctx, cfg.Stream)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ensure stream %s: %w", cfg.Stream, err)
	}
	return stream, checkStream(stream.CachedInfo().Config)
}

func checkStream(c jetstream.StreamConfig) error {
	switch {
	case !slices.Contains(c.Subjects, subjectPrefix+">"):
		return fmt.Errorf("%w: stream %s: subjects are %q, must hold %q", ErrStreamConfig, c.Name, c.Subjects, subjectPrefix+">")
	case c.Storage != jetstream.FileStorage:
		return fmt.Errorf("%w: stream %s: storage is %s, must be file", ErrStreamConfig, c.Name, c.Storage)
	case c.Retention != jetstream.LimitsPolicy:
		return fmt.Errorf("%w: stream %s: retention is %s, must be limits", ErrStreamConfig, c.Name, c.Retention)
	case c.Discard != jetstream.DiscardNew:
		return fmt.Errorf("%w: stream %s: discard is %s, must be new", ErrStreamConfig, c.Name, c.Discard)
	case c.MaxMsgsPerSubject > 0 && !c.DiscardNewPerSubject:
		return fmt.Errorf("%w: stream %s: keeps %d messages a subject and drops older ones", ErrStreamConfig, c.Name, c.MaxMsgsPerSubject)
	}
	return nil
}

// ensureConsumer creates or updates a durable consumer of the stream.
func (r *runner) ensureConsumer(ctx context.Context, c jetstream.ConsumerConfig) (source, error) {
	stream, err := EnsureStream(ctx, r.js, r.cfg)
	if err != nil {
		return nil, err
	}
	if _, err := stream.CreateOrUpdateConsumer(ctx, c); err != nil {
		return nil, fmt.Errorf("ensure consumer %s: %w", c.Durable, err)
	}
	return r.source(r.cfg.Stream, c.Durable), nil
}

// ensureAdvisories creates the stream of the server's advisories about the stream, and a consumer of it.
func (r *runner) ensureAdvisories(ctx context.Context, c jetstream.ConsumerConfig) (source, error) {
	name := AdvisoryStream(r.cfg.Stream)
	stream, err := r.js.Stream(ctx, name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = r.js.CreateStream(ctx, jetstream.StreamConfig{
			Name:        name,
			Description: "The server's advisories about messages of " + r.cfg.Stream + " that it will not deliver again",
			Subjects:    []string{advisoryMaxDeliveries + r.cfg.Stream + ".*", advisoryTerminated + r.cfg.Stream + ".*"},
			Storage:     jetstream.FileStorage,
			Retention:   jetstream.LimitsPolicy,
			Discard:     jetstream.DiscardOld,
			MaxAge:      r.cfg.MaxAge,
			MaxBytes:    r.cfg.MaxBytes,
			Replicas:    r.cfg.Replicas,
		})
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			stream, err = r.js.Stream(ctx, name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ensure stream %s: %w", name, err)
	}
	c.AckPolicy, c.AckWait, c.MaxAckPending = jetstream.AckExplicitPolicy, r.cfg.AckWait, 256
	if _, err := stream.CreateOrUpdateConsumer(ctx, c); err != nil {
		return nil, fmt.Errorf("ensure consumer %s of %s: %w", c.Durable, name, err)
	}
	return r.source(name, c.Durable), nil
}

// source returns the source of a durable consumer's messages.
func (r *runner) source(stream, durable string) source {
	return &puller{nc: r.js.Conn(), stream: stream, consumer: durable, expiry: r.cfg.PullExpiry, log: r.log}
}

package alerts

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

// ErrStreamConfig is returned if the stream of alerts exists with settings under which alerts can be erased or replaced
// by a message, expire at once, or appear that nobody published. Its text names the setting.
var ErrStreamConfig = errors.New("alerts: the stream's settings would lose alerts")

// ProbeBytes is the maximum size of the stream of probes, which lies beside the stream of alerts.
const ProbeBytes = 1 << 20

const (
	maxConsumers = 256         // of a new stream
	minMaxAge    = time.Minute // shortest time that a stream may keep alerts
)

// StreamConfig is the stream of alerts. If the stream exists, it stays as its operator made it.
type StreamConfig struct {
	// Name of the stream that alerts are published to.
	Stream string `name:"stream" default:"UNCERTAINTY"`
	// How long a new stream keeps alerts.
	MaxAge time.Duration `name:"max-age" default:"720h" min:"1m"`
	// Maximum size of a new stream in bytes. Defaults to 4294967296 (4 GiB).
	MaxBytes int64 `name:"max-bytes" default:"4294967296" min:"1048576"`
	// Replicas of a new stream; 3 if NATS is clustered.
	Replicas int `name:"replicas" default:"1" min:"1" max:"5"`
}

// StreamSink publishes alerts to a JetStream stream with the subjects uncertainty.>. The alert's id goes along as
// Nats-Msg-Id, so that within the stream's duplicate window it is stored once; beyond it subscribers key on the id.
type StreamSink struct {
	js      jetstream.JetStream
	cfg     StreamConfig
	ensured atomic.Bool
}

// NewStreamSink returns a sink that publishes through js. The stream is created with the first alert if it does
// not exist.
func NewStreamSink(js jetstream.JetStream, cfg StreamConfig) *StreamSink {
	return &StreamSink{js: js, cfg: settings.WithDefaults(cfg)}
}

// Name returns [schema.SinkStream].
func (s *StreamSink) Name() schema.Sink { return schema.SinkStream }

// Stream returns the name of the stream.
func (s *StreamSink) Stream() string { return s.cfg.Stream }

// Ensure creates the stream if it does not exist, so that subscribers find it before the first alert.
func (s *StreamSink) Ensure(ctx context.Context) error {
	stream, err := s.js.Stream(ctx, s.cfg.Stream)
	if err == nil {
		err = checkStream(stream.CachedInfo().Config)
	}
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		_, err = s.js.CreateStream(ctx, jetstream.StreamConfig{
			Name:        s.cfg.Stream,
			Description: "Uncertainty alerts of decuwatch, CloudEvents of type " + schema.TypeUncertaintyAlert,
			Subjects:    []string{"uncertainty.>"},
			Storage:     jetstream.FileStorage,
			Retention:   jetstream.LimitsPolicy,
			Discard:     jetstream.DiscardOld,
			MaxAge:      s.cfg.MaxAge,
			MaxBytes:    s.cfg.MaxBytes,
			Replicas:    s.cfg.Replicas,
			Duplicates:  min(2*time.Minute, s.cfg.MaxAge),

			MaxConsumers: maxConsumers,
			DenyDelete:   true,
		})
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("ensure stream %s: %w", s.cfg.Stream, err)
	}
	s.ensured.Store(true)
	return nil
}

// Check returns an [ErrStreamConfig] if the stream has such settings now, or the error of reading them. A stream that
// does not exist yet has no messages.
func (s *StreamSink) Check(ctx context.Context) error {
	stream, err := s.js.Stream(ctx, s.cfg.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the settings of stream %s: %w", s.cfg.Stream, err)
	}
	return checkStream(stream.CachedInfo().Config)
}

// checkStream returns an [ErrStreamConfig] that names each setting under which alerts would be lost. Dropping the
// oldest alerts is allowed: Postgres keeps them.
func checkStream(c jetstream.StreamConfig) error {
	var errs []error
	for _, s := range []struct {
		name    string
		value   any
		allowed string
		ok      bool
	}{
		{"subjects", c.Subjects, `must hold "uncertainty.>"`, slices.Contains(c.Subjects, "uncertainty.>")},
		{"retention", c.Retention, "must be limits", c.Retention == jetstream.LimitsPolicy},
		{"storage", c.Storage, "must be file", c.Storage == jetstream.FileStorage},
		{"max_age", c.MaxAge, fmt.Sprintf("must be 0 (unlimited) or at least %s", minMaxAge), c.MaxAge == 0 ||
			c.MaxAge >= minMaxAge},
		{"mirror", c.Mirror != nil, "must be unset", c.Mirror == nil},
		{"sources", len(c.Sources), "must be empty", len(c.Sources) == 0},
		{"subject_transform", c.SubjectTransform != nil, "must be unset", c.SubjectTransform == nil},
		{"no_ack", c.NoAck, "must be false", !c.NoAck},
		{"sealed", c.Sealed, "must be false", !c.Sealed},
		{"allow_rollup_hdrs", c.AllowRollup, "must be false", !c.AllowRollup},
		{"allow_msg_ttl", c.AllowMsgTTL, "must be false", !c.AllowMsgTTL},
		{"allow_msg_counter", c.AllowMsgCounter, "must be false", !c.AllowMsgCounter},
		{"allow_msg_schedules", c.AllowMsgSchedules, "must be false", !c.AllowMsgSchedules},
		{"persist_mode", c.PersistMode, "must be default", c.PersistMode == jetstream.DefaultPersistMode},
	} {
		if !s.ok {
			errs = append(errs, fmt.Errorf("%w: stream %s: %s is %v, %s", ErrStreamConfig, c.Name, s.name, s.value, s.allowed))
		}
	}
	return errors.Join(errs...)
}

// Send publishes m and returns when the stream has stored it.
func (s *StreamSink) Send(ctx context.Context, m schema.OutboxMessage) error {
	if !s.ensured.Load() {
		if err := s.Ensure(ctx); err != nil {
			return err
		}
	}
	msg := &nats.Msg{Subject: m.Subject, Header: nats.Header{}, Data: m.Body}
	for k, v := range m.Header {
		msg.Header[k] = v
	}
	msg.Header.Set(schema.HeaderMessageID, m.AlertID)
	_, err := s.js.PublishMsg(ctx, msg, jetstream.WithExpectStream(s.cfg.Stream))
	if err != nil {
		s.ensured.Store(false) // somebody may have removed it
		return fmt.Errorf("publish alert %s: %w", m.AlertID, err)
	}
	return nil
}

// Probe fails unless an alert could be stored now: the stream of alerts is there and takes messages, and a message that
// is published to a small stream beside it, which has as many replicas, is stored. That stream keeps one message of
// each publisher, named by id, and no subscriber of alerts sees it.
func (s *StreamSink) Probe(ctx context.Context, id string) error {
	if err := s.takes(ctx); err != nil {
		return err
	}
	name, subject := s.cfg.Stream+"_PROBE", "decuwatch.probe."+s.cfg.Stream+"."
	_, err := s.js.Publish(ctx, subject+id, []byte("probe"), jetstream.WithExpectStream(name),
		jetstream.WithRetryAttempts(0))
	if errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders) {
		_, err = s.js.CreateStream(ctx, jetstream.StreamConfig{
			Name:              name,
			Description:       "Readiness of decuwatch: the last probe of each worker",
			Subjects:          []string{subject + "*"},
			Storage:           jetstream.FileStorage,
			MaxMsgsPerSubject: 1,
			MaxBytes:          ProbeBytes,
			MaxAge:            24 * time.Hour,
			Replicas:          s.cfg.Replicas,
		})
		if err == nil || errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			_, err = s.js.Publish(ctx, subject+id, []byte("probe"), jetstream.WithExpectStream(name),
				jetstream.WithRetryAttempts(0))
		}
	}
	if err != nil {
		return fmt.Errorf("store a probe in stream %s: %w", name, err)
	}
	return nil
}

// takes fails if the stream of alerts is not there or takes no message.
func (s *StreamSink) takes(ctx context.Context) error {
	stream, err := s.js.Stream(ctx, s.cfg.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		s.ensured.Store(false)
		if err = s.Ensure(ctx); err == nil {
			stream, err = s.js.Stream(ctx, s.cfg.Stream)
		}
	}
	if err != nil {
		return fmt.Errorf("look at stream %s: %w", s.cfg.Stream, err)
	}
	info := stream.CachedInfo()
	c, n := info.Config, info.State
	switch {
	case c.Sealed:
		return fmt.Errorf("stream %s is sealed", s.cfg.Stream)
	case !slices.ContainsFunc(c.Subjects, func(subject string) bool {
		return subject == "uncertainty.>" || subject == "uncertainty.alert.>" || subject == ">"
	}):
		return fmt.Errorf("stream %s: subject uncertainty.alert.> is not one of %q", s.cfg.Stream, c.Subjects)
	case c.NoAck:
		return fmt.Errorf("stream %s acknowledges nothing (no_ack)", s.cfg.Stream)
	case info.Mirror != nil || c.Mirror != nil:
		return fmt.Errorf("stream %s is a mirror", s.cfg.Stream)
	// nolint:gosec // positive
	case c.Discard == jetstream.DiscardNew && c.MaxBytes > 0 && n.Bytes+maxAlert > uint64(c.MaxBytes):
		return fmt.Errorf("stream %s is full: %d of %d bytes", s.cfg.Stream, n.Bytes, c.MaxBytes)
	case c.Discard == jetstream.DiscardNew && c.MaxMsgs > 0 && n.Msgs >= uint64(c.MaxMsgs): //nolint:gosec // positive
		return fmt.Errorf("stream %s is full: %d of %d messages", s.cfg.Stream, n.Msgs, c.MaxMsgs)
	}
	return nil
}

// maxAlert is more than an alert with its headers takes in the stream.
const maxAlert = 16 << 10

package alerts

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// SinkStream is the name of the sink that publishes to JetStream.
const SinkStream = "nats"

// StreamConfig is the configuration of a [StreamSink].
type StreamConfig struct {
	Name     string        // of the stream. Defaults to UNCERTAINTY
	MaxAge   time.Duration // how long a new stream keeps alerts. Defaults to 30 days
	MaxBytes int64         // how large a new stream may grow, in bytes. Defaults to 4 GiB
	Replicas int           // of a new stream. Defaults to 1
}

// WithDefaults returns c with defaults in place of zero values.
func (c StreamConfig) WithDefaults() StreamConfig {
	def(&c.Name, "UNCERTAINTY")
	def(&c.MaxAge, 30*24*time.Hour)
	def(&c.MaxBytes, 4<<30)
	def(&c.Replicas, 1)
	return c
}

// StreamSink publishes alerts to a JetStream stream with the subjects uncertainty.>. The alert's id goes along as
// Nats-Msg-Id, so that within the stream's duplicate window it is stored once; beyond it subscribers key on the id.
type StreamSink struct {
	js      jetstream.JetStream
	cfg     StreamConfig
	ensured atomic.Bool
}

// NewStreamSink returns a sink that publishes through js. The stream is created with the first alert where it does
// not exist.
func NewStreamSink(js jetstream.JetStream, cfg StreamConfig) *StreamSink {
	return &StreamSink{js: js, cfg: cfg.WithDefaults()}
}

// Name returns SinkStream.
func (s *StreamSink) Name() string { return SinkStream }

// Ensure creates the stream where it does not exist, so that subscribers find it before the first alert.
func (s *StreamSink) Ensure(ctx context.Context) error {
	_, err := s.js.Stream(ctx, s.cfg.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		_, err = s.js.CreateStream(ctx, jetstream.StreamConfig{
			Name:        s.cfg.Name,
			Description: "Uncertainty alerts of decuwatch, CloudEvents of type " + schema.TypeUncertaintyAlert,
			Subjects:    []string{"uncertainty.>"},
			Storage:     jetstream.FileStorage,
			Retention:   jetstream.LimitsPolicy,
			Discard:     jetstream.DiscardOld,
			MaxAge:      s.cfg.MaxAge,
			MaxBytes:    s.cfg.MaxBytes,
			Replicas:    s.cfg.Replicas,
			Duplicates:  min(2*time.Minute, s.cfg.MaxAge),
		})
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("ensure stream %s: %w", s.cfg.Name, err)
	}
	s.ensured.Store(true)
	return nil
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
	_, err := s.js.PublishMsg(ctx, msg, jetstream.WithExpectStream(s.cfg.Name))
	if err != nil {
		s.ensured.Store(false) // somebody may have removed it
		return fmt.Errorf("publish alert %s: %w", m.AlertID, err)
	}
	return nil
}

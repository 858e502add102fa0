package consumers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// Prefixes of the subjects of the server's advisories. The names of the stream and the consumer follow.
const (
	advisoryMaxDeliveries = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES."
	advisoryTerminated    = "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED."
)

// advisory is what the server says about a message that it will not deliver again.
type advisory struct {
	StreamSeq  uint64 `json:"stream_seq"`
	Consumer   string `json:"consumer"`
	Deliveries int    `json:"deliveries"`
	Reason     string `json:"reason"`
}

// backstop handles messages that the server will not deliver again.
type backstop struct{ *Runner }

// givenUp returns the loop that takes messages of one model after the last delivery that the consumer allows. Only
// consumers of earlier versions of this program have such a bound. The messages are handled like any other delivery.
func (b backstop) givenUp(model string) loop {
	return loop{
		name:  Durable(model) + " (given up)",
		slots: 64,
		pull:  64,
		open: func(ctx context.Context) (source, error) {
			return b.ensureAdvisories(ctx, jetstream.ConsumerConfig{
				Durable:       Durable(model),
				Description:   "Handles events of model " + model + " that ran out of deliveries",
				FilterSubject: advisoryMaxDeliveries + b.cfg.Stream.Name + "." + Durable(model),
			})
		},
		take: func(work context.Context, msg *message, h *heartbeat) {
			b.takeAdvisory(work, msg, h, func(a advisory) (decision, error) {
				return b.handleGivenUp(work, model, a, msg.delivered, h)
			})
		},
	}
}

// terminated returns the loop that makes terminated messages dead letters, also if somebody terminated them by hand. A
// message that has a verdict keeps it.
func (b backstop) terminated() loop {
	return loop{
		name:  durableTerminated,
		slots: 64,
		pull:  64,
		open: func(ctx context.Context) (source, error) {
			return b.ensureAdvisories(ctx, jetstream.ConsumerConfig{
				Durable:       durableTerminated,
				Description:   "Sees to it that terminated events have a dead letter",
				FilterSubject: advisoryTerminated + b.cfg.Stream.Name + ".*",
			})
		},
		take: func(work context.Context, msg *message, h *heartbeat) {
			b.takeAdvisory(work, msg, h, func(a advisory) (decision, error) {
				model, ok := strings.CutPrefix(a.Consumer, durablePrefix)
				if !ok {
					return decision{action: acknowledge}, nil // not a consumer of ours
				}
				reason := fmt.Sprintf("terminated after %d deliveries", a.Deliveries)
				if a.Reason != "" {
					reason += ": " + a.Reason
				}
				d := decision{action: deadLetter, kind: schema.KindGivenUp, reason: clean(reason)}
				in, _, err := b.load(work, a.StreamSeq, a.Deliveries, schema.SubjectGeneration(model))
				if err != nil {
					return d, err
				}
				if known, err := b.goneSettled(work, in); known || err != nil {
					return decision{action: acknowledge}, err
				}
				if strings.HasPrefix(a.Reason, deadLetterPrefix) { // this program did, and counted it then
					return d, b.writeDeadLetter(work, in, d)
				}
				return d, b.deadLetter(work, in, d)
			})
		},
	}
}

// takeAdvisory acts on one advisory and acknowledges it, or has it delivered again later.
func (b backstop) takeAdvisory(
	work context.Context, msg *message, h *heartbeat, act func(a advisory) (decision, error),
) {
	defer h.stop()
	var a advisory
	if err := json.Unmarshal(msg.Payload, &a); err != nil || a.StreamSeq == 0 {
		term := msg.term("cannot be read") // retrying will not help
		b.log.Error("advisory cannot be read", "subject", clean(msg.Subject), "err", errors.Join(err, term))
		return
	}
	d, err := act(a)
	h.stop()
	switch {
	case d.action == abandon:
		return
	case err == nil && (d.action == acknowledge || d.action == deadLetter):
		if err = b.doubleAck(work, msg); err == nil {
			return
		}
	}
	delay := d.delay
	if d.action != release {
		delay = max(delay, b.cfg.retryDelay(msg.delivered))
	}
	nak := msg.nak(delay)
	b.log.Warn("advisory is tried again", "subject", clean(msg.Subject), "sequence", a.StreamSeq, "reason", d.reason,
		"delay", delay, "err", errors.Join(err, nak))
}

// handleGivenUp handles a message that the server will not deliver again. Again is how often its advisory was
// delivered.
func (b backstop) handleGivenUp(
	work context.Context, model string, a advisory, again int, h *heartbeat,
) (decision, error) {
	in, invalid, err := b.load(work, a.StreamSeq, a.Deliveries+again, schema.SubjectGeneration(model))
	if err != nil {
		return decision{}, err
	}
	if known, err := b.goneSettled(work, in); known || err != nil {
		return decision{action: acknowledge}, err
	}
	work, end := b.trace(work, in)
	defer end()
	return b.attempt(work, in, invalid, h), nil
}

// goneSettled reports whether a message has left the stream and has its verdict. A settled message may be purged before
// its advisory is read. Its digest is then unknown, so the verdict is looked up by sequence number.
func (b backstop) goneSettled(work context.Context, in incoming) (bool, error) {
	if !in.delivery.Time.IsZero() || b.cfg.Ledger == nil {
		return false, nil
	}
	rows, err := b.cfg.Ledger.Settled(work, b.cfg.Stream.Name, in.delivery.Sequence, in.delivery.Sequence)
	return len(rows) > 0, err
}

// ensureAdvisories creates the stream of the server's advisories about the stream, and a consumer of it.
func (b backstop) ensureAdvisories(ctx context.Context, c jetstream.ConsumerConfig) (source, error) {
	name := AdvisoryStream(b.cfg.Stream.Name)
	stream, err := b.js.Stream(ctx, name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = b.js.CreateStream(ctx, jetstream.StreamConfig{
			Name:        name,
			Description: "The server's advisories about messages of " + b.cfg.Stream.Name + " that it will not deliver again",
			Subjects: []string{
				advisoryMaxDeliveries + b.cfg.Stream.Name + ".*", advisoryTerminated + b.cfg.Stream.Name + ".*",
			},
			Storage:   jetstream.FileStorage,
			Retention: jetstream.LimitsPolicy,
			Discard:   jetstream.DiscardOld,
			MaxAge:    b.cfg.Stream.MaxAge,
			MaxBytes:  b.cfg.Stream.MaxBytes,
			Replicas:  b.cfg.Stream.Replicas,

			MaxConsumers: maxConsumers,
			DenyDelete:   true,
		})
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			stream, err = b.js.Stream(ctx, name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ensure stream %s: %w", name, err)
	}
	if err := checkSettings(stream.CachedInfo().Config, advisorySettings); err != nil {
		return nil, err
	}
	c.AckPolicy, c.AckWait, c.MaxAckPending = jetstream.AckExplicitPolicy, b.cfg.AckWait, 256
	if _, err := stream.CreateOrUpdateConsumer(ctx, c); err != nil {
		return nil, fmt.Errorf("ensure consumer %s of %s: %w", c.Durable, name, err)
	}
	return b.source(name, c.Durable), nil
}

package consumers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// Subjects of the server's advisories; stream and consumer follow.
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

// givenUp returns the loop that takes one model's messages which the server will not deliver again, because the consumer
// has a bound on deliveries: an earlier version of this program set one. They are handled like any other delivery.
func (r *runner) givenUp(model string) loop {
	return loop{
		name:  Durable(model) + " (given up)",
		slots: 64,
		pull:  64,
		open: func(ctx context.Context) (source, error) {
			return r.ensureAdvisories(ctx, jetstream.ConsumerConfig{
				Durable:       Durable(model),
				Description:   "Handles events of model " + model + " that ran out of deliveries",
				FilterSubject: advisoryMaxDeliveries + r.cfg.Stream.Name + "." + Durable(model),
			})
		},
		take: func(work context.Context, msg *message, h *held) {
			r.takeAdvisory(work, msg, h, func(a advisory) (decision, error) { return r.handleGivenUp(work, model, a, msg.delivered, h) })
		},
	}
}

// terminated returns the loop that sees to it that messages which were terminated have their dead letter, also where
// somebody did it by hand. A message that has a verdict keeps it.
func (r *runner) terminated() loop {
	return loop{
		name:  durableTerminated,
		slots: 64,
		pull:  64,
		open: func(ctx context.Context) (source, error) {
			return r.ensureAdvisories(ctx, jetstream.ConsumerConfig{
				Durable:       durableTerminated,
				Description:   "Sees to it that terminated events have a dead letter",
				FilterSubject: advisoryTerminated + r.cfg.Stream.Name + ".*",
			})
		},
		take: func(work context.Context, msg *message, h *held) {
			r.takeAdvisory(work, msg, h, func(a advisory) (decision, error) {
				model, ok := strings.CutPrefix(a.Consumer, durablePrefix)
				if !ok {
					return decision{action: acknowledge}, nil // of a consumer that is not ours
				}
				reason := fmt.Sprintf("terminated after %d deliveries", a.Deliveries)
				if a.Reason != "" {
					reason += ": " + a.Reason
				}
				d := decision{action: bury, kind: schema.KindGivenUp, reason: clean(reason)}
				l, _, err := r.load(work, a.StreamSeq, a.Deliveries, schema.SubjectGeneration(model))
				if err != nil {
					return d, err
				}
				if known, err := r.goneSettled(work, l); known || err != nil {
					return decision{action: acknowledge}, err
				}
				if strings.HasPrefix(a.Reason, buriedPrefix) { // it was counted when it was terminated
					return d, r.writeDeadLetter(work, l, d)
				}
				return d, r.bury(work, l, d)
			})
		},
	}
}

// takeAdvisory has one advisory acted on and acknowledges it, or has it delivered again later.
func (r *runner) takeAdvisory(work context.Context, msg *message, h *held, act func(a advisory) (decision, error)) {
	defer h.release()
	var a advisory
	if err := json.Unmarshal(msg.Payload, &a); err != nil || a.StreamSeq == 0 {
		term := msg.term("cannot be read") // retrying will not help
		r.log.Error("advisory cannot be read", "subject", clean(msg.Subject), "err", errors.Join(err, term))
		return
	}
	d, err := act(a)
	h.release()
	switch {
	case d.action == abandon:
		return
	case err == nil && (d.action == acknowledge || d.action == bury):
		if err = r.doubleAck(work, msg); err == nil {
			return
		}
	}
	delay := d.delay
	if d.action != release {
		delay = max(delay, r.cfg.retryDelay(msg.delivered))
	}
	nak := msg.nak(delay)
	r.log.Warn("advisory is tried again", "subject", clean(msg.Subject), "sequence", a.StreamSeq, "reason", d.reason,
		"delay", delay, "err", errors.Join(err, nak))
}

// handleGivenUp handles a message that the server will not deliver again. Again is the number of the advisory's delivery.
func (r *runner) handleGivenUp(work context.Context, model string, a advisory, again int, h *held) (decision, error) {
	l, invalid, err := r.load(work, a.StreamSeq, a.Deliveries+again, schema.SubjectGeneration(model))
	if err != nil {
		return decision{}, err
	}
	if known, err := r.goneSettled(work, l); known || err != nil {
		return decision{action: acknowledge}, err
	}
	return r.attempt(work, l, invalid, h), nil
}

// goneSettled reports whether a message has left the stream and has its verdict: a settled one may be purged before the
// advisory on it is read, and without the message its verdict cannot be known by its digest.
func (r *runner) goneSettled(work context.Context, l letter) (bool, error) {
	if !l.delivery.Time.IsZero() || r.cfg.Ledger == nil {
		return false, nil
	}
	rows, err := r.cfg.Ledger.Settled(work, r.cfg.Stream.Name, l.delivery.Sequence, l.delivery.Sequence)
	return len(rows) > 0, err
}

// buriedPrefix begins the reason with which this program terminates a message, after its dead letter was committed.
const buriedPrefix = "dead letter: "

// buryStored writes the dead letter of a message that is read from the stream.
func (r *runner) buryStored(work context.Context, sequence uint64, delivered int, subject string, d decision) error {
	l, _, err := r.load(work, sequence, delivered, subject)
	if err != nil {
		return err
	}
	return r.bury(work, l, d)
}

// load reads a message from the stream by its sequence. If the message is gone from the stream, only its subject is
// known. Invalid says why its event cannot be handled.
func (r *runner) load(ctx context.Context, sequence uint64, delivered int, subject string) (l letter, invalid, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	stored, err := ReadStored(ctx, r.js, r.cfg.Stream.Name, sequence, false)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		stored, err = Stored{Subject: subject, Sequence: sequence}, nil
	}
	if err != nil {
		return letter{}, nil, err
	}
	d := schema.Delivery{Stream: r.cfg.Stream.Name, Sequence: sequence, Time: stored.Time, Delivered: delivered, Digest: stored.Digest()}
	l, invalid = read(stored, d)
	return l, invalid, nil
}

package consumers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// Subjects of the server's advisories; stream and consumer follow.
const (
	advisoryMaxDeliveries = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES."
	advisoryTerminated    = "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED."
)

// unowned returns the loop that looks at every message's subject and makes a dead letter of those that no model's
// consumer takes, whichever worker it belongs to.
func (r *runner) unowned() loop {
	owners := &owners{r: r}
	return loop{
		name:  durableUnowned,
		slots: 1024,
		pull:  512,
		open: func(ctx context.Context) (source, error) {
			return r.ensureConsumer(ctx, jetstream.ConsumerConfig{
				Durable:       durableUnowned,
				Description:   "Finds events of models that nobody scores",
				FilterSubject: subjectPrefix + ">",
				DeliverPolicy: jetstream.DeliverAllPolicy,
				AckPolicy:     jetstream.AckExplicitPolicy,
				AckWait:       r.cfg.AckWait,
				MaxAckPending: 4096,
			})
		},
		take: func(work context.Context, msg *message, h *held) {
			defer h.release()
			if err := r.takeUnowned(work, owners, msg); err != nil {
				h.release()
				_ = msg.nak(r.cfg.RetryDelay)
				r.log.Warn("message of an unknown model is tried again", "subject", clean(msg.Subject), "err", err)
			}
		},
	}
}

// takeUnowned acknowledges an owned message, for its owner takes it, and makes a dead letter of one that has been
// without an owner for the grace time.
func (r *runner) takeUnowned(work context.Context, owners *owners, msg *message) error {
	model := strings.TrimPrefix(msg.Subject, subjectPrefix)
	owned, err := owners.has(work, model, false)
	if err != nil {
		return err
	}
	if owned {
		return msg.ack() // losing it costs another look only
	}
	if wait := r.cfg.UnownedGrace - time.Since(msg.Time); wait > 0 {
		return msg.nak(wait)
	}
	// The list of owners may be older than the owner.
	if owned, err = owners.has(work, model, true); err != nil || owned {
		return errors.Join(err, msg.ack())
	}
	d := decision{action: bury, kind: KindUnknownModel, field: "data.model", reason: clean(fmt.Sprintf("no consumer scores the subject %s", msg.Subject))}
	if err := r.buryStored(work, msg.Sequence, msg.delivered, msg.Subject, d); err != nil {
		return err
	}
	return r.doubleAck(work, msg)
}

// owners knows the models that have a durable consumer, of whichever worker.
type owners struct {
	r      *runner
	mu     sync.Mutex
	models map[string]bool
	asked  time.Time
}

// has reports whether model has a consumer; fresh asks the server where the last answer is older than a second.
func (o *owners) has(ctx context.Context, model string, fresh bool) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.models == nil || fresh && time.Since(o.asked) > time.Second || time.Since(o.asked) > time.Minute {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		stream, err := o.r.js.Stream(ctx, o.r.cfg.Stream)
		if err != nil {
			return false, fmt.Errorf("list consumers: %w", err)
		}
		models := map[string]bool{}
		names := stream.ConsumerNames(ctx)
		for name := range names.Name() {
			if model, ok := strings.CutPrefix(name, durablePrefix); ok {
				models[model] = true
			}
		}
		if err := names.Err(); err != nil {
			return false, fmt.Errorf("list consumers: %w", err)
		}
		o.models, o.asked = models, time.Now()
	}
	// Models of this worker count before their consumers stand.
	for _, m := range o.r.cfg.Models {
		if m == model {
			return true, nil
		}
	}
	return o.models[model], nil
}

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
				FilterSubject: advisoryMaxDeliveries + r.cfg.Stream + "." + Durable(model),
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
				FilterSubject: advisoryTerminated + r.cfg.Stream + ".*",
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
				d := decision{action: bury, kind: KindGivenUp, reason: clean(reason)}
				return d, r.buryStored(work, a.StreamSeq, a.Deliveries, schema.SubjectGeneration(model), d)
			})
		},
	}
}

// takeAdvisory has one advisory acted on and acknowledges it, or has it delivered again later.
func (r *runner) takeAdvisory(work context.Context, msg *message, h *held, act func(a advisory) (decision, error)) {
	defer h.release()
	var a advisory
	if err := json.Unmarshal(msg.Payload, &a); err != nil || a.StreamSeq == 0 {
		// No other delivery would be read either.
		r.log.Error("advisory cannot be read", "subject", clean(msg.Subject), "err", errors.Join(err, msg.term("cannot be read")))
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
	err = errors.Join(err, msg.nak(delay))
	r.log.Warn("advisory is tried again", "subject", clean(msg.Subject), "sequence", a.StreamSeq, "reason", d.reason, "delay", delay, "err", err)
}

// handleGivenUp handles a message that the server will not deliver again. Again is the number of the advisory's delivery.
func (r *runner) handleGivenUp(work context.Context, model string, a advisory, again int, h *held) (decision, error) {
	l, invalid, err := r.load(work, a.StreamSeq, a.Deliveries+again, schema.SubjectGeneration(model))
	if err != nil {
		return decision{}, err
	}
	return r.attempt(work, l, invalid, h), nil
}

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
	stored, err := ReadStored(ctx, r.js, r.cfg.Stream, sequence, false)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		stored, err = Stored{Subject: subject, Sequence: sequence}, nil
	}
	if err != nil {
		return letter{}, nil, err
	}
	d := schema.Delivery{Stream: r.cfg.Stream, Sequence: sequence, Time: stored.Time, Delivered: delivered, Digest: stored.Digest()}
	l, invalid = read(stored, d)
	return l, invalid, nil
}

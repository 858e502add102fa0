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

// soloTries is how often a message that the server gave up on is handled once more, alone.
const soloTries = 2

// givenUp returns the loop that takes one model's messages whose deliveries ran out while their workers ended without a
// verdict. A message that ends its workers takes down with it whatever else they hold, so each is handled once more,
// alone: what is innocent gets its verdict. One whose worker ends then too becomes a dead letter.
func (r *runner) givenUp(model string) loop {
	return loop{
		name:  Durable(model) + " (given up)",
		slots: 1,
		pull:  1,
		open: func(ctx context.Context) (source, error) {
			return r.ensureAdvisories(ctx, jetstream.ConsumerConfig{
				Durable:       Durable(model),
				Description:   "Handles events of model " + model + " that ran out of deliveries once more, alone",
				FilterSubject: advisoryMaxDeliveries + r.cfg.Stream + "." + Durable(model),
			})
		},
		take: func(work context.Context, msg *message, h *held) {
			r.takeAdvisory(work, msg, h, func(a advisory, tries int) error { return r.handleAlone(work, model, a, tries) })
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
			r.takeAdvisory(work, msg, h, func(a advisory, _ int) error {
				model, ok := strings.CutPrefix(a.Consumer, durablePrefix)
				if !ok {
					return nil // of a consumer that is not ours
				}
				reason := fmt.Sprintf("terminated after %d deliveries", a.Deliveries)
				if a.Reason != "" {
					reason += ": " + a.Reason
				}
				d := decision{action: bury, kind: KindGivenUp, reason: clean(reason)}
				return r.buryStored(work, a.StreamSeq, a.Deliveries, schema.SubjectGeneration(model), d)
			})
		},
	}
}

// takeAdvisory has one advisory acted on and acknowledges it, or has it delivered again where that failed. Tries is 1 for
// its first delivery.
func (r *runner) takeAdvisory(work context.Context, msg *message, h *held, act func(a advisory, tries int) error) {
	defer h.release()
	var a advisory
	err := json.Unmarshal(msg.Payload, &a)
	if err != nil {
		r.log.Error("advisory cannot be read", "subject", msg.Subject, "err", errors.Join(err, msg.term("cannot be read")))
		return // no other delivery would be read either
	}
	if err = act(a, msg.delivered); err == nil {
		h.release()
		err = r.doubleAck(work, msg)
	}
	if err != nil {
		h.release()
		_ = msg.nak(r.cfg.RetryDelay)
		r.log.Warn("advisory is tried again", "subject", msg.Subject, "sequence", a.StreamSeq, "err", err)
	}
}

// handleAlone handles a message that the server gave up on once more, or writes its dead letter.
func (r *runner) handleAlone(work context.Context, model string, a advisory, tries int) error {
	l, invalid, err := r.load(work, a.StreamSeq, a.Deliveries, schema.SubjectGeneration(model))
	if err != nil {
		return err
	}
	d := decision{action: bury, kind: KindGivenUp, reason: clean(fmt.Sprintf("no verdict after %d deliveries: its workers ended", a.Deliveries))}
	if invalid == nil && tries <= soloTries {
		r.log.Warn("handling an event once more, alone", "model", model, "sequence", a.StreamSeq, "deliveries", a.Deliveries, "source", l.event.Source, "id", l.event.ID)
		err := r.admit(work, *l.event, l.delivery)
		if drained(work) && err != nil {
			return err
		}
		if d = r.cfg.decide(err, r.cfg.MaxDeliver, false); d.action == acknowledge {
			return nil
		}
	}
	return r.bury(work, l, d)
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

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
// consumer takes, whichever worker it belongs to. It reads headers only.
func (r *runner) unowned() loop {
	owners := &owners{r: r}
	return loop{
		name:  durableUnowned,
		slots: 1024,
		pull:  512,
		ensure: func(ctx context.Context) (jetstream.Consumer, error) {
			return r.ensureConsumer(ctx, jetstream.ConsumerConfig{
				Durable:       durableUnowned,
				Description:   "Finds events of models that nobody scores",
				FilterSubject: subjectPrefix + ">",
				DeliverPolicy: jetstream.DeliverAllPolicy,
				AckPolicy:     jetstream.AckExplicitPolicy,
				AckWait:       r.cfg.AckWait,
				MaxAckPending: 4096,
				HeadersOnly:   true,
			})
		},
		take: func(work context.Context, msg jetstream.Msg, h *held) {
			defer h.release()
			if err := r.takeUnowned(work, owners, msg); err != nil {
				h.release()
				_ = msg.NakWithDelay(r.cfg.RetryDelay)
				r.log.Warn("message of an unknown model is tried again", "subject", clean(msg.Subject()), "err", err)
			}
		},
	}
}

// takeUnowned acknowledges an owned message, for its owner takes it, and makes a dead letter of one that has been
// without an owner for the grace time.
func (r *runner) takeUnowned(work context.Context, owners *owners, msg jetstream.Msg) error {
	model := strings.TrimPrefix(msg.Subject(), subjectPrefix)
	owned, err := owners.has(work, model, false)
	if err != nil {
		return err
	}
	if owned {
		return msg.Ack() // losing it costs another look only
	}
	meta, err := msg.Metadata()
	if err != nil {
		return err
	}
	if wait := r.cfg.UnownedGrace - time.Since(meta.Timestamp); wait > 0 {
		return msg.NakWithDelay(wait)
	}
	// The list of owners may be older than the owner.
	if owned, err = owners.has(work, model, true); err != nil || owned {
		return errors.Join(err, msg.Ack())
	}
	d := decision{action: bury, kind: KindUnknownModel, field: "data.model", reason: clean(fmt.Sprintf("no consumer scores the subject %s", msg.Subject()))}
	if err := r.buryStored(work, meta.Sequence.Stream, int(meta.NumDelivered), msg.Subject(), d); err != nil { //nolint:gosec // small
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

// advisories returns the loop that makes dead letters of messages that the server gave up on: whose deliveries ran out
// while their worker was killed, or that somebody terminated by hand. A message that has a verdict keeps it.
func (r *runner) advisories() loop {
	return loop{
		name:   durableGivenUp,
		slots:  64,
		pull:   64,
		ensure: r.ensureAdvisories,
		take: func(work context.Context, msg jetstream.Msg, h *held) {
			defer h.release()
			if err := r.takeAdvisory(work, msg); err != nil {
				h.release()
				_ = msg.NakWithDelay(r.cfg.RetryDelay)
				r.log.Warn("advisory is tried again", "subject", msg.Subject(), "err", err)
			}
		},
	}
}

// advisory is what the server says about a message that it will not deliver again.
type advisory struct {
	Stream     string `json:"stream"`
	Consumer   string `json:"consumer"`
	StreamSeq  uint64 `json:"stream_seq"`
	Deliveries int    `json:"deliveries"`
	Reason     string `json:"reason"`
}

func (r *runner) takeAdvisory(work context.Context, msg jetstream.Msg) error {
	var a advisory
	if err := json.Unmarshal(msg.Data(), &a); err != nil {
		r.log.Error("advisory is not JSON", "subject", msg.Subject(), "err", err)
		return msg.Term()
	}
	if !strings.HasPrefix(a.Consumer, durablePrefix) || a.Stream != r.cfg.Stream {
		return r.doubleAck(work, msg) // of a consumer that is not ours
	}
	reason := fmt.Sprintf("no verdict after %d deliveries", a.Deliveries)
	if a.Reason != "" {
		reason = fmt.Sprintf("terminated after %d deliveries: %s", a.Deliveries, a.Reason)
	}
	d := decision{action: bury, kind: KindGivenUp, reason: clean(reason)}
	subject := schema.SubjectGeneration(strings.TrimPrefix(a.Consumer, durablePrefix))
	if err := r.buryStored(work, a.StreamSeq, a.Deliveries, subject, d); err != nil {
		return err
	}
	return r.doubleAck(work, msg)
}

// buryStored writes the dead letter of a message that is read from the stream by its sequence number; one that has
// left the stream gets a dead letter without its content.
func (r *runner) buryStored(work context.Context, sequence uint64, delivered int, subject string, d decision) error {
	l := letter{model: strings.TrimPrefix(subject, subjectPrefix), subject: subject, delivery: schema.Delivery{Stream: r.cfg.Stream, Sequence: sequence, Delivered: delivered}}
	ctx, cancel := context.WithTimeout(work, 5*time.Second)
	defer cancel()
	stream, err := r.js.Stream(ctx, r.cfg.Stream)
	if err != nil {
		return fmt.Errorf("read message %d: %w", sequence, err)
	}
	raw, err := stream.GetMsg(ctx, sequence)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		l.delivery.Digest = schema.Digest(nil, nil)
	case err != nil:
		return fmt.Errorf("read message %d: %w", sequence, err)
	default:
		l.subject, l.payload = raw.Subject, raw.Data
		l.delivery.Digest = schema.Digest(raw.Header, raw.Data)
		if ev, err := schema.Decode(raw.Header, raw.Data); err == nil {
			l.event = &ev
		}
	}
	return r.bury(work, l, d)
}

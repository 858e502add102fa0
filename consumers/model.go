package consumers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/decuwatch/decuwatch/schema"
)

// model returns the loop that consumes one model's events.
func (r *runner) model(model string) loop {
	return loop{
		name:  Durable(model),
		slots: r.cfg.MaxInFlight,
		pull:  r.cfg.PullMaxMessages,
		open: func(ctx context.Context) (source, error) {
			return r.ensureConsumer(ctx, jetstream.ConsumerConfig{
				Durable:       Durable(model),
				Description:   "Scores the events of model " + model,
				FilterSubject: schema.SubjectGeneration(model),
				DeliverPolicy: jetstream.DeliverAllPolicy,
				AckPolicy:     jetstream.AckExplicitPolicy,
				AckWait:       r.cfg.AckWait,
				MaxDeliver:    r.cfg.MaxDeliver,
				MaxAckPending: r.cfg.MaxAckPending,
			})
		},
		take: func(work context.Context, msg *message, h *held) {
			r.deliver(work, model, msg, h)
		},
	}
}

// deliver brings one message to its verdict and acknowledges it accordingly.
func (r *runner) deliver(work context.Context, model string, msg *message, h *held) {
	defer h.release()
	if msg.delivered > 1 {
		r.cfg.Metrics.redelivered(model)
	}
	start := time.Now()
	l, err := read(msg.Stored, msg.delivery())
	r.cfg.Metrics.decode.Observe(time.Since(start).Seconds())
	traced, end := r.trace(work, l)
	defer end()
	if err == nil {
		err = r.admit(traced, *l.event, l.delivery)
	}
	d := r.cfg.decide(err, l.delivery.Delivered, drained(work))
	if d.action == bury {
		if err := r.bury(work, l, d); err != nil {
			// The message stays with the server. Where this was its last delivery, the server's advisory brings it back.
			d = decision{action: redeliver, reason: clean("write dead letter: " + err.Error()), delay: r.cfg.retryDelay(l.delivery.Delivered)}
			if drained(work) {
				d.action = release
			}
		}
	}
	h.release()
	r.settle(traced, msg, l, d)
}

// trace begins the span of one delivery, in the trace that the producer began.
func (r *runner) trace(work context.Context, l letter) (context.Context, func()) {
	var ev schema.Event
	if l.event != nil {
		ev = *l.event
	}
	parent := propagation.MapCarrier{"traceparent": ev.TraceParent, "tracestate": ev.TraceState}
	ctx, span := r.cfg.Tracer.Start(propagation.TraceContext{}.Extract(work, parent), "consume", trace.WithSpanKind(trace.SpanKindConsumer), trace.WithAttributes(
		attribute.String("messaging.system", "nats"), attribute.String("messaging.destination.name", l.subject),
		attribute.String("messaging.consumer.group.name", Durable(l.model)), attribute.String("cloudevents.event_source", ev.Source),
		attribute.String("cloudevents.event_id", ev.ID), attribute.Int("decuwatch.delivered", l.delivery.Delivered)))
	return ctx, func() { span.End() }
}

// admit waits until the event's rows are free, then has it handled. While a dependency is away it keeps the event and
// tries again after, so that an outage costs no delivery.
func (r *runner) admit(work context.Context, ev schema.Event, d schema.Delivery) error {
	start := time.Now()
	rows := int64(min(max(r.handler.Rows(ev), 1), r.cfg.MaxRows))
	if err := r.rows.Acquire(work, rows); err != nil {
		return fmt.Errorf("wait for %d rows: %w", rows, context.Cause(work))
	}
	defer r.rows.Release(rows)
	if err := r.gate.wait(work); err != nil {
		return fmt.Errorf("wait for dependencies: %w", err)
	}
	r.cfg.Metrics.queue.Observe(time.Since(start).Seconds())
	for {
		err := r.handle(work, ev, d)
		switch {
		case err == nil:
			r.gate.success()
			return nil
		case drained(work) || !transient(err):
			return err
		case isUnavailable(err):
			r.gate.trip(err)
		case r.gate.check(work):
			return err
		}
		if gone := r.gate.wait(work); gone != nil {
			return errors.Join(err, gone)
		}
	}
}

// transient reports whether err says nothing about the message itself.
func transient(err error) bool {
	var invalid *schema.Invalid
	var kinded interface{ DeadLetterKind() string }
	return !errors.As(err, &invalid) && !errors.As(err, &kinded)
}

// handle calls the handler with the event's deadline. A panic is an error of this event.
func (r *runner) handle(work context.Context, ev schema.Event, d schema.Delivery) (err error) {
	ctx, cancel := context.WithTimeoutCause(work, r.cfg.HandleTimeout, fmt.Errorf("handle event timed out after %s", r.cfg.HandleTimeout))
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			r.log.Error("the handler panicked", "source", ev.Source, "id", ev.ID, "err", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("the handler panicked: %v", p)
		}
	}()
	err = r.handler.Handle(ctx, ev, d)
	if err != nil && ctx.Err() != nil && work.Err() == nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return err
}

// bury writes the message's dead letter. While a dependency is away it waits and tries again; a refusal by a healthy
// one is returned.
func (r *runner) bury(work context.Context, l letter, d decision) error {
	const tries = 3
	v := schema.Verdict{Delivery: l.delivery, DeadLetter: &schema.DeadLetter{
		Event: l.event, Source: l.source, EventID: l.id, Subject: clean(l.subject), Payload: clip(l.payload), Field: d.field, Reason: d.reason, Kind: d.kind,
	}}
	retry := backoff{min: 100 * time.Millisecond, max: time.Second}
	for refused := 0; ; {
		ctx, cancel := context.WithTimeout(work, r.cfg.HandleTimeout)
		err := r.dead.DeadLetter(ctx, v)
		cancel()
		switch {
		case err == nil:
			r.gate.success()
			r.cfg.Metrics.deadLetter(d.kind)
			return nil
		case drained(work):
			return err
		case isUnavailable(err):
			r.gate.trip(err)
		case r.gate.check(work):
			if refused++; refused == tries {
				return err
			}
			retry.wait(work)
			continue
		}
		if gone := r.gate.wait(work); gone != nil {
			return errors.Join(err, gone)
		}
	}
}

// settle tells the server what became of the message, and the log.
func (r *runner) settle(work context.Context, msg *message, l letter, d decision) {
	var err error
	level := slog.LevelDebug
	switch d.action {
	case acknowledge:
		start := time.Now()
		ctx, span := r.cfg.Tracer.Start(work, "ack")
		err = r.doubleAck(ctx, msg)
		if err != nil {
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
		r.cfg.Metrics.ack.Observe(time.Since(start).Seconds())
	case bury:
		level = slog.LevelWarn
		err = msg.term(strings.TrimSpace(d.kind + " " + d.field + " " + d.reason))
	case redeliver:
		level = slog.LevelWarn
		err = msg.nak(d.delay)
	case release:
		level = slog.LevelInfo
		err = msg.nak(0)
	}
	if !r.log.Enabled(work, level) && err == nil {
		return
	}
	attrs := []any{"action", string(d.action), "model", l.model, "stream", l.delivery.Stream, "sequence", l.delivery.Sequence, "delivered", l.delivery.Delivered}
	if l.event != nil {
		attrs = append(attrs, "source", l.event.Source, "id", l.event.ID)
	}
	if d.action == bury {
		attrs = append(attrs, "kind", d.kind, "field", d.field)
	}
	if d.reason != "" {
		attrs = append(attrs, "reason", d.reason)
	}
	if err != nil { // the server delivers it again, and finds its verdict
		level = slog.LevelWarn
		attrs = append(attrs, "err", err)
	}
	r.log.Log(work, level, "message settled", attrs...)
}

// doubleAck acknowledges msg and waits until the server has it. It tries again for as long as the server would wait
// for the message; after that the message is delivered again and its verdict found.
func (r *runner) doubleAck(work context.Context, msg *message) error {
	// A drain that has run out of time still flushes acknowledgements of what is committed.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(work), min(r.cfg.AckWait, 10*time.Second))
	defer cancel()
	retry := backoff{min: 20 * time.Millisecond, max: time.Second}
	for {
		try, done := context.WithTimeout(ctx, max(r.cfg.AckWait/10, time.Second))
		err := msg.doubleAck(try)
		done()
		if err == nil {
			return nil
		}
		if retry.wait(ctx); ctx.Err() != nil || work.Err() != nil || errors.Is(err, nats.ErrConnectionClosed) {
			return fmt.Errorf("acknowledge: %w", err)
		}
	}
}

// clip cuts a payload to what a dead letter keeps.
func clip(payload []byte) []byte {
	return payload[:min(len(payload), schema.MaxPayload)]
}

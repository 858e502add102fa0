package consumers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/schema"
)

// model returns the loop that consumes one model's events.
func (r *Runner) model(model string) loop {
	return loop{
		name:  Durable(model),
		slots: r.cfg.MaxInFlight,
		pull:  max(1, r.cfg.MaxInFlight/4),
		open: func(ctx context.Context) (source, error) {
			return r.ensureConsumer(ctx, jetstream.ConsumerConfig{
				Durable:       Durable(model),
				Description:   "Scores the events of model " + model,
				FilterSubject: schema.SubjectGeneration(model),
				DeliverPolicy: jetstream.DeliverAllPolicy,
				AckPolicy:     jetstream.AckExplicitPolicy,
				AckWait:       r.cfg.AckWait,
				MaxDeliver:    -1, // attempts are counted in Postgres; the server gives up on nothing
				MaxAckPending: r.cfg.maxAckPending(),
			})
		},
		take: func(work context.Context, msg *message, h *heartbeat) {
			r.deliver(work, model, msg, h)
		},
	}
}

// deliver brings one message to its verdict and acknowledges it accordingly.
func (r *Runner) deliver(work context.Context, model string, msg *message, h *heartbeat) {
	if msg.delivered > 1 {
		r.cfg.Metrics.redelivered(model)
	}
	start := time.Now()
	in, err := read(msg.Stored, msg.delivery())
	r.cfg.Metrics.decode.Since(work, start)
	traced, end := r.trace(work, in)
	defer end()
	d := r.attempt(traced, in, err, h)
	if h.stop(); d.action != abandon {
		r.settle(traced, msg, in, d)
	}
}

// attempt brings a message to its verdict, if possible. Invalid says why its event cannot be handled. Unless the
// decision is to deliver the message again, the verdict is committed.
func (r *Runner) attempt(work context.Context, in incoming, invalid error, h *heartbeat) decision {
	err, level := invalid, ordinary
	if err == nil {
		level, err = r.isolation(work, in)
	}
	if err == nil {
		var begun bool
		if begun, err = r.admit(work, in, level, h); !begun {
			level = ordinary
		}
	}
	if h.overran() && err != nil {
		return decision{action: abandon} // another worker has the message by now
	}
	if errors.Is(err, errGivenAway) {
		return decision{action: release, reason: clean(err.Error()), delay: r.cfg.RetryDelay}
	}
	failed := 0
	if !drained(work) && transient(err) {
		var broken error
		if failed, broken = r.countFailure(work, in.delivery, level); broken != nil {
			err = errors.Join(err, broken)
		}
	}
	d := r.cfg.decide(err, failed, drained(work))
	if d.action == deadLetter {
		if err := r.deadLetter(work, in, d); err != nil {
			d = decision{
				action: redeliver, delay: r.cfg.retryDelay(in.delivery.Delivered),
				reason: clean("write dead letter: " + err.Error()),
			}
			if drained(work) {
				d.action = release
			}
		}
	}
	if d.action == release {
		r.noteHandBack(work, in.delivery, level)
	}
	return d
}

// trace starts the span of one delivery. It continues the producer's trace.
func (r *Runner) trace(work context.Context, in incoming) (context.Context, func()) {
	var ev schema.Event
	if in.event != nil {
		ev = *in.event
	}
	ctx := propagation.TraceContext{}.Extract(work, propagation.MapCarrier{
		"traceparent": ev.TraceParent, "tracestate": ev.TraceState,
	})
	ctx, span := r.cfg.Tracer.Start(ctx, "consume", trace.WithSpanKind(trace.SpanKindConsumer), trace.WithAttributes(
		attribute.String("messaging.system", "nats"),
		attribute.String("messaging.destination.name", in.subject),
		attribute.String("messaging.consumer.group.name", Durable(in.model)),
		attribute.String("cloudevents.event_source", ev.Source), attribute.String("cloudevents.event_id", ev.ID),
		attribute.Int("decuwatch.delivered", in.delivery.Delivered)))
	return ctx, func() { span.End() }
}

// admit waits until the event's rows are free, then has it handled. While a dependency is away, it keeps the event and
// tries again afterwards, so an outage costs no attempt. Begun says whether the attempt was recorded.
//
// The dependency may be this worker's alone, such as its device. So an event that has waited for HandleTimeout goes to
// another worker, if that can be recorded. If it cannot, the database is away, and other workers need it, too.
func (r *Runner) admit(work context.Context, in incoming, level isolation, h *heartbeat) (begun bool, err error) {
	start := time.Now()
	cost, handle, err := r.plan(work, in)
	if err != nil {
		return false, err
	}
	rows := level.rows(cost, r.cfg.MaxRows)
	if err := r.rows.Acquire(work, rows); err != nil {
		return false, fmt.Errorf("wait for %d rows: %w", rows, context.Cause(work))
	}
	defer r.rows.Release(rows)
	recorded := ordinary
	for {
		wait, cancel := context.WithTimeout(work, r.cfg.HandleTimeout)
		away := r.gate.wait(wait)
		cancel()
		switch {
		case away == nil:
		case drained(work):
			return begun, errors.Join(err, fmt.Errorf("wait for dependencies: %w", away))
		case r.handBack(work, in.delivery, recorded) == nil:
			return begun, errors.Join(err, errGivenAway)
		default:
			continue
		}
		if !begun {
			r.cfg.Metrics.queue.Since(work, start)
			if err := r.begin(work, in.delivery, level); err != nil {
				return false, err
			}
			begun, recorded = true, level
		}
		err = r.handle(work, in, handle, level, h)
		switch {
		case err == nil:
			r.gate.success()
			return true, nil
		case drained(work) || !transient(err) || h.overran():
			return true, err
		case isUnavailable(err):
			r.gate.trip(err)
		case r.gate.check(work):
			return true, err
		}
	}
}

// plan decides how an event is handled. An event that waits for its rows goes to another worker when this one is
// stopped.
func (r *Runner) plan(work context.Context, in incoming) (
	cost int, handle func(context.Context, schema.Delivery) error, err error,
) {
	ctx, cancel := context.WithCancel(work)
	defer cancel()
	defer context.AfterFunc(r.stop, cancel)() //nolint:contextcheck // a stop ends the work's own context
	for {
		cost, handle, err = r.handler.Plan(ctx, *in.event, in.delivery)
		if err == nil {
			return cost, handle, nil
		}
		if ctx.Err() == nil {
			r.gate.trip(err)
			wait, done := context.WithTimeout(ctx, r.cfg.HandleTimeout)
			back := r.gate.wait(wait)
			done()
			if back == nil {
				continue
			}
		}
		if drained(work) {
			return 0, nil, fmt.Errorf("plan event: %w", context.Cause(work))
		}
		r.noteHandBack(work, in.delivery, ordinary)
		return 0, nil, errors.Join(err, errGivenAway)
	}
}

// errGivenAway means that the message goes to another worker, and that this is recorded.
var errGivenAway = errors.New(
	"this worker is stopped, or a dependency of it is away for too long: the message goes to another worker")

// transient reports whether err says nothing about the message itself, so that retrying may help.
func transient(err error) bool {
	if err == nil {
		return false
	}
	var invalid *schema.Invalid
	var kinded interface{ DeadLetterKind() schema.DeadLetterKind }
	return !errors.As(err, &invalid) && !errors.As(err, &kinded)
}

// handle handles the event within its deadline. A panic is an error of the event. If the handler does not return soon
// after the deadline, pulling is paused and the heartbeats end, so that another worker gets the message.
func (r *Runner) handle(
	work context.Context, in incoming, handle func(context.Context, schema.Delivery) error, level isolation, h *heartbeat,
) (err error) {
	timeout := r.cfg.HandleTimeout
	ctx, cancel := context.WithTimeoutCause(work, timeout, fmt.Errorf("handle event timed out after %s", timeout))
	defer cancel()
	most := timeout + r.cfg.AckWait/3
	r.overruns.Add(1)
	overrun := time.AfterFunc(most, func() {
		defer r.overruns.Done()
		r.overrun(work, in, level, h, most)
	})
	defer func() {
		if overrun.Stop() {
			r.overruns.Done()
		}
	}()
	defer func() {
		if p := recover(); p != nil {
			r.log.Error("the handler panicked",
				"source", in.event.Source, "id", in.event.ID, "err", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("the handler panicked: %v", p)
		}
	}()
	err = handle(ctx, in.delivery)
	if err != nil && ctx.Err() != nil && work.Err() == nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return err
}

// deadLetter writes the message's dead letter and counts it.
func (r *Runner) deadLetter(work context.Context, in incoming, d decision) error {
	err := r.writeDeadLetter(work, in, d)
	if err == nil {
		r.cfg.Metrics.deadLetter(d.kind)
	}
	return err
}

// writeDeadLetter writes the message's dead letter. If a healthy database refuses the content of the message, it writes
// a dead letter without content. Otherwise the message would be tried for as long as the stream keeps it.
func (r *Runner) writeDeadLetter(work context.Context, in incoming, d decision) error {
	v := schema.Verdict{Delivery: in.delivery, DeadLetter: &schema.DeadLetter{
		Event: in.event, Source: in.source, EventID: in.id, Subject: clean(in.subject), Payload: clip(in.payload),
		Field: d.field, Reason: d.reason, Kind: d.kind,
	}}
	put := func(ctx context.Context) error { return r.handler.DeadLetter(ctx, v) }
	err := r.write(work, put)
	if err == nil || drained(work) {
		return err
	}
	r.log.Error("a dead letter is refused, and is written without the content of its message",
		"sequence", in.delivery.Sequence, "kind", d.kind, "err", err)
	reason := fmt.Sprintf("%s (written without the content of the message, which was refused: %v)", d.reason, err)
	v.DeadLetter = &schema.DeadLetter{Subject: clean(in.subject), Kind: d.kind, Reason: clean(reason)}
	return r.write(work, put)
}

// deadLetterPrefix begins the reason with which this program terminates a message after it committed the dead letter.
const deadLetterPrefix = "dead letter: "

// load reads a message from the stream by its sequence number. If the message is gone, only its subject is known.
// Invalid says why its event cannot be handled.
func (r *Runner) load(
	ctx context.Context, sequence uint64, delivered int, subject string,
) (in incoming, invalid, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	stored, err := ReadStored(ctx, r.js, r.cfg.Stream.Name, sequence)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		stored, err = Stored{Subject: subject, Sequence: sequence}, nil
	}
	if err != nil {
		return incoming{}, nil, err
	}
	in, invalid = read(stored, schema.Delivery{
		Stream: r.cfg.Stream.Name, Sequence: sequence, Time: stored.Time, Delivered: delivered, Digest: stored.Digest(),
	})
	return in, invalid, nil
}

// overrun leaves a message whose handler does not return to another worker, and pauses pulling. If the dependencies are
// still unhealthy afterwards, the message is not to blame.
func (r *Runner) overrun(work context.Context, in incoming, level isolation, h *heartbeat, after time.Duration) {
	h.overrun()
	r.log.Error("the handler does not return", "model", in.model, "sequence", in.delivery.Sequence,
		"source", in.event.Source, "id", in.event.ID, "after", after)
	r.gate.trip(fmt.Errorf("the handler has not returned after %s", after))
	doubt, cancel := context.WithTimeout(work, 2*probeTimeout)
	defer cancel()
	if r.gate.wait(doubt) != nil {
		r.noteHandBack(work, in.delivery, level)
	}
}

// write calls f until it succeeds. While a dependency is away, it waits and tries again. If a healthy dependency
// refuses, it returns the error.
func (r *Runner) write(work context.Context, f func(context.Context) error) error {
	const tries = 3
	retry := backoff.Backoff{Min: 100 * time.Millisecond, Max: time.Second}
	for refused := 0; ; {
		ctx, cancel := context.WithTimeout(work, r.cfg.HandleTimeout)
		err := f(ctx)
		cancel()
		switch {
		case err == nil:
			r.gate.success()
			return nil
		case drained(work):
			return err
		case isUnavailable(err):
			r.gate.trip(err)
		case r.gate.check(work):
			if refused++; refused == tries {
				return err
			}
			retry.Wait(work)
			continue
		}
		// The gate may be shut because of another dependency, which f does not need.
		wait, cancel := context.WithTimeout(work, probeMost)
		_ = r.gate.wait(wait) // f is tried again in any case
		cancel()
		if drained(work) {
			return errors.Join(err, context.Cause(work))
		}
	}
}

// settle tells the server what becomes of the message, and logs it.
func (r *Runner) settle(work context.Context, msg *message, in incoming, d decision) {
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
		r.cfg.Metrics.ack.Since(work, start)
	case deadLetter:
		level = slog.LevelWarn
		err = msg.term(deadLetterPrefix + string(d.kind) + " " + d.field + " " + d.reason)
	case redeliver:
		level = slog.LevelWarn
		err = msg.nak(d.delay)
	case release:
		level = slog.LevelInfo
		err = msg.nak(d.delay)
	case abandon: // the server delivers it again by itself
	}
	if !r.log.Enabled(work, level) && err == nil {
		return
	}
	attrs := []any{
		"action", string(d.action), "model", in.model, "stream", in.delivery.Stream,
		"sequence", in.delivery.Sequence, "delivered", in.delivery.Delivered,
	}
	if in.event != nil {
		attrs = append(attrs, "source", in.event.Source, "id", in.event.ID)
	}
	if d.action == deadLetter {
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

// doubleAck acknowledges msg and waits until the server confirms it. It retries for as long as the server would wait
// for the message. After that the message is delivered again, and its verdict is found.
func (r *Runner) doubleAck(work context.Context, msg *message) error {
	// Even after a drain has run out of time, what is committed is acknowledged.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(work), min(r.cfg.AckWait, 10*time.Second))
	defer cancel()
	retry := backoff.Backoff{Min: 20 * time.Millisecond, Max: time.Second}
	for {
		try, done := context.WithTimeout(ctx, max(r.cfg.AckWait/10, time.Second))
		err := msg.doubleAck(try)
		done()
		if err == nil {
			return nil
		}
		if retry.Wait(ctx); ctx.Err() != nil || work.Err() != nil || errors.Is(err, nats.ErrConnectionClosed) {
			return fmt.Errorf("acknowledge: %w", err)
		}
	}
}

// clip cuts a payload to what a dead letter may have.
func clip(payload []byte) []byte {
	return payload[:min(len(payload), schema.MaxPayload)]
}

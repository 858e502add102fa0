package alerts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/errgroup"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/schema"
)

// Sink takes alerts: a JetStream stream, a webhook, an Alertmanager.
type Sink interface {
	// Name is the sink's name in the outbox and in metrics.
	Name() schema.Sink
	// Send returns nil once the sink has taken the message for good. It may be called again with a message that it has
	// taken already: receivers key on the alert's id. An error with a method RetryAfter() time.Duration puts the next
	// attempt off for at least that long.
	Send(ctx context.Context, m schema.OutboxMessage) error
}

// Outbox holds committed alerts until their sinks take them.
type Outbox interface {
	// OutboxNext returns at most limit messages that are due at the sink, oldest first, and withholds them from every
	// other caller for the lease.
	OutboxNext(ctx context.Context, sink schema.Sink, limit int, lease time.Duration) ([]schema.OutboxMessage, error)
	// OutboxDelivered records that the sink has taken the messages.
	OutboxDelivered(ctx context.Context, ids []int64) error
	// OutboxFailed records a failed attempt and after what time the next may be made.
	OutboxFailed(ctx context.Context, id int64, reason string, wait time.Duration) error
	// OutboxStats returns what is due by sink.
	OutboxStats(ctx context.Context) ([]schema.OutboxStats, error)
	// SilenceCounts returns how many silences of each model are in force.
	SilenceCounts(ctx context.Context) (map[string]int, error)
	Listener
}

// RelayConfig is the configuration of a [Relay].
type RelayConfig struct {
	Batch       int           // messages taken from the outbox at once. Defaults to 32
	Concurrency int           // messages sent to one sink at once. Defaults to 16
	SendTimeout time.Duration // of one attempt. Defaults to 5 s
	Poll        time.Duration // how often the outbox is looked at although nothing was announced. Defaults to 1 s
	RetryDelay  time.Duration // after the first failed attempt; doubles with each further one. Defaults to 500 ms
	RetryMax    time.Duration // Defaults to 1 min
	Measure     time.Duration // how often the metrics of what is due are read. Defaults to 5 s
	Logger      *slog.Logger  // Defaults to slog.Default()
	Metrics     *Metrics      // Nil counts nothing
	Tracer      trace.Tracer  // Defaults to none
}

// WithDefaults returns c with defaults in place of zero values.
func (c RelayConfig) WithDefaults() RelayConfig {
	c.Batch = cmp.Or(c.Batch, 32)
	c.Concurrency = cmp.Or(c.Concurrency, 16)
	c.SendTimeout = cmp.Or(c.SendTimeout, 5*time.Second)
	c.Poll = cmp.Or(c.Poll, time.Second)
	c.RetryDelay = cmp.Or(c.RetryDelay, 500*time.Millisecond)
	c.RetryMax = cmp.Or(c.RetryMax, time.Minute)
	c.Measure = cmp.Or(c.Measure, 5*time.Second)
	c.Logger = cmp.Or(c.Logger, slog.Default())
	if c.Tracer == nil {
		c.Tracer = noop.NewTracerProvider().Tracer("")
	}
	return c
}

// Relay sends alerts from the outbox to each sink until the sink has taken them: at least once, by however many relays
// at the same time.
type Relay struct {
	cfg    RelayConfig
	outbox Outbox
	sinks  []Sink
	wake   []chan struct{} // one for each sink
}

// NewRelay returns a relay from outbox to the sinks. Negative numbers in cfg, and two sinks of one name, are errors.
func NewRelay(outbox Outbox, cfg RelayConfig, sinks ...Sink) (*Relay, error) {
	cfg = cfg.WithDefaults()
	if cfg.Batch < 0 || cfg.Concurrency < 0 || cfg.SendTimeout < 0 || cfg.Poll < 0 || cfg.RetryDelay < 0 ||
		cfg.RetryMax < 0 || cfg.Measure < 0 {
		return nil, errors.New("alerts: a number of the relay's configuration is negative")
	}
	names := map[schema.Sink]bool{}
	r := &Relay{cfg: cfg, outbox: outbox, sinks: sinks}
	var list []schema.Sink
	for _, s := range sinks {
		if names[s.Name()] {
			return nil, fmt.Errorf("alerts: two sinks are named %q", s.Name())
		}
		names[s.Name()] = true
		list = append(list, s.Name())
		r.wake = append(r.wake, make(chan struct{}, 1))
	}
	if r.cfg.Metrics == nil {
		r.cfg.Metrics = NewMetrics(nil, nil, list)
	}
	return r, nil
}

// Run sends until ctx ends and returns nil. Attempts in flight then are finished and recorded.
func (r *Relay) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	announced := make(chan struct{}, 1)
	group.Go(func() error { return listen(ctx, r.outbox, ChannelOutbox, announced) })
	group.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-announced:
				for _, w := range r.wake {
					select {
					case w <- struct{}{}:
					default:
					}
				}
			}
		}
	})
	group.Go(func() error { return r.measure(ctx) })
	for i, s := range r.sinks {
		group.Go(func() error { return r.serve(ctx, s, r.wake[i]) })
	}
	return group.Wait()
}

// serve sends to one sink.
func (r *Relay) serve(ctx context.Context, s Sink, wake <-chan struct{}) error {
	retry := backoff.Backoff{Min: r.cfg.RetryDelay, Max: 10 * time.Second}
	for ctx.Err() == nil {
		n, err := r.round(ctx, s)
		switch {
		case err != nil && ctx.Err() == nil:
			r.cfg.Logger.Warn("outbox is not available", "sink", s.Name(), "err", err)
			retry.Wait(ctx)
			continue
		case n == r.cfg.Batch:
			retry.Failures = 0
			continue
		}
		retry.Failures = 0
		timer := time.NewTimer(r.cfg.Poll)
		select {
		case <-ctx.Done():
		case <-wake:
		case <-timer.C:
		}
		timer.Stop()
	}
	return nil
}

// round sends one batch and returns its number of messages.
func (r *Relay) round(ctx context.Context, s Sink) (int, error) {
	// The lease covers the attempts of a whole batch, so that no other relay makes them too; recording them included. What
	// a killed relay had taken is sent again after the lease.
	lease := time.Duration((r.cfg.Batch+r.cfg.Concurrency-1)/r.cfg.Concurrency)*r.cfg.SendTimeout + recordTimeout
	// Taken although ctx may end meanwhile: what is leased to nobody would wait for the end of the lease.
	next, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	batch, err := r.outbox.OutboxNext(next, s.Name(), r.cfg.Batch, lease)
	cancel()
	if err != nil || len(batch) == 0 {
		return 0, err
	}
	// What has been sent is recorded even when ctx ends meanwhile.
	ctx = context.WithoutCancel(ctx)
	var mu sync.Mutex
	var sent []int64
	var failed []func() error
	group := errgroup.Group{}
	group.SetLimit(r.cfg.Concurrency)
	for _, m := range batch {
		group.Go(func() error {
			err := r.send(ctx, s, m)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				sent = append(sent, m.ID)
				return nil
			}
			wait := backoff.After(m.Attempts+1, r.cfg.RetryDelay, r.cfg.RetryMax)
			var asked interface{ RetryAfter() time.Duration }
			if errors.As(err, &asked) {
				wait = max(wait, min(asked.RetryAfter(), maxRetryAfter))
			}
			failed = append(failed, func() error {
				return r.record(ctx, func(ctx context.Context) error { return r.outbox.OutboxFailed(ctx, m.ID, err.Error(), wait) })
			})
			return nil
		})
	}
	_ = group.Wait() // its functions return nil
	var errs []error
	if len(sent) > 0 {
		errs = append(errs, r.record(ctx, func(ctx context.Context) error { return r.outbox.OutboxDelivered(ctx, sent) }))
	}
	for _, f := range failed {
		errs = append(errs, f())
	}
	return len(batch), errors.Join(errs...)
}

const recordTimeout = 5 * time.Second

// maxRetryAfter is the longest time for which a receiver can put the next attempt off.
const maxRetryAfter = time.Hour

func (r *Relay) record(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	return f(ctx)
}

func (r *Relay) send(ctx context.Context, s Sink, m schema.OutboxMessage) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.SendTimeout)
	defer cancel()
	ctx, span := r.cfg.Tracer.Start(propagation.TraceContext{}.Extract(ctx, parent(m)), "publish",
		trace.WithSpanKind(trace.SpanKindProducer), trace.WithAttributes(
			attribute.String("messaging.system", string(s.Name())),
			attribute.String("messaging.destination.name", m.Subject),
			attribute.String("messaging.message.id", m.AlertID)))
	defer span.End()
	start := time.Now()
	err := s.Send(ctx, m)
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
	}
	r.cfg.Metrics.sent(ctx, s.Name(), start, err)
	if err != nil {
		r.cfg.Logger.Warn("alert was not taken", "sink", s.Name(), "alert", m.AlertID, "attempts", m.Attempts+1, "err", err)
	}
	return err
}

// parent returns the trace context of the event that raised the alert.
func parent(m schema.OutboxMessage) propagation.MapCarrier {
	c := propagation.MapCarrier{}
	if v := m.Header[schema.HeaderTraceParent]; len(v) == 1 {
		c["traceparent"] = v[0]
	}
	return c
}

// measure keeps the metrics of what is due, and of what is silenced.
func (r *Relay) measure(ctx context.Context) error {
	for ctx.Err() == nil {
		query, cancel := context.WithTimeout(ctx, recordTimeout)
		if stats, err := r.outbox.OutboxStats(query); err == nil {
			r.cfg.Metrics.setOutbox(r.sinks, stats)
		}
		if counts, err := r.outbox.SilenceCounts(query); err == nil {
			r.cfg.Metrics.setSilences(counts)
		}
		cancel()
		backoff.Sleep(ctx, backoff.Jitter(r.cfg.Measure))
	}
	return nil
}

// Package consumers takes events from a JetStream stream, hands each to a [Handler], and turns the handler's error
// into the acknowledgement: nil is acknowledged, a permanent error becomes a dead letter, anything else is delivered
// again later.
//
// One durable pull consumer exists for each model, and others take the server's advisories about messages that it gave
// up on. A keeper looks after the stream as a whole: it finds messages that nobody takes, checks that each message has its
// verdict, and purges those that are settled.
package consumers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/schema"
)

// Handler does the work on one event.
type Handler interface {
	// Handle returns nil once the event's verdict is committed. Its error is the acknowledgement decision: an
	// error that wraps a *schema.Invalid, or an error with a kind (see [Permanent]), becomes a dead letter; one that is
	// [Unavailable] has the message kept until what is away is back; any other is tried again. The context ends at the event's deadline, or when a drain has run out of time.
	Handle(ctx context.Context, ev schema.Event, d schema.Delivery) error
	// Rows is the cost of the event in rows of U-Net work, at least 1.
	Rows(ev schema.Event) int
}

// DeadLetters keeps the verdict on messages that cannot be scored.
type DeadLetters interface {
	// DeadLetter commits v, whose DeadLetter is set. Where the message, or its event, has a verdict already, that
	// one stands and the result is nil.
	DeadLetter(ctx context.Context, v schema.Verdict) error
}

// Config is the configuration of [Run].
type Config struct {
	Models []string // names of the models whose events are consumed; at least one

	Stream      string        // name of the stream. Defaults to GENERATION
	MaxAge      time.Duration // how long a new stream keeps messages. Defaults to 7 days
	MaxBytes    int64         // how large a new stream may grow, in bytes, before publishing is refused. Defaults to 8 GiB
	Replicas    int           // of a new stream. Defaults to 1; use 3 where NATS is clustered
	AckWait     time.Duration // silence of a worker after which its messages go to another. Defaults to 30 s
	MaxDeliver  int           // failed attempts on one message, at most; then it becomes a dead letter. Defaults to 5
	MaxInFlight int           // messages of one model that a worker holds at once. Defaults to 256
	MaxRows     int           // rows of U-Net work that are admitted at once, over all models. Defaults to 4096

	PullMaxMessages int           // messages asked for at once. Defaults to a quarter of MaxInFlight
	MaxAckPending   int           // messages of one model that all workers hold at once. Defaults to 4 x MaxInFlight
	PullExpiry      time.Duration // how long the server keeps one pull open. Defaults to 5 s
	HandleTimeout   time.Duration // deadline of one event, from its admission on. Defaults to 60 s
	DrainTimeout    time.Duration // how long a stop waits for messages in flight. Defaults to 20 s
	RetryDelay      time.Duration // before the second delivery; doubles with each further one. Defaults to 1 s
	RetryMaxDelay   time.Duration // Defaults to 30 s
	UnownedGrace    time.Duration // after which a message of a model without a consumer becomes a dead letter. Defaults to 10 s
	OrphanGrace     time.Duration // after which a message that nobody pulls from its consumer becomes one. Defaults to 24 h

	CheckInterval time.Duration // between two rounds of the keeper. Defaults to 10 s
	KeepSettled   time.Duration // how long the stream keeps a message that has its verdict. Defaults to 24 h

	// Ledger holds the verdicts. Nil: the keeper purges nothing and cannot tell lost messages.
	Ledger Ledger
	// Standing tells whether the stream and the consumers have settings under which no event is lost. May be nil.
	Standing *Standing

	// Healthy reports whether what the handler depends on is there; it is asked after a failure. While it fails,
	// nothing is pulled, and messages in flight are kept and tried again after; those that have waited for HandleTimeout go
	// to another worker, unless Tries fails, too. Nil is always healthy.
	Healthy func(context.Context) error

	Tries Tries // counts attempts on messages. Nil counts those of this Run only
	// Pulling is told how each loop fares. Defaults to nil: nobody is told.
	Pulling *Pulling

	Logger  *slog.Logger // Defaults to slog.Default()
	Metrics *Metrics     // see [NewMetrics]. Nil counts nowhere
	Tracer  trace.Tracer // of the spans consume and ack, in the trace that the producer began. Defaults to none
}

// WithDefaults returns c with defaults in place of zero values.
func (c Config) WithDefaults() Config {
	def(&c.Stream, "GENERATION")
	def(&c.MaxAge, 7*24*time.Hour)
	def(&c.MaxBytes, 8<<30)
	def(&c.Replicas, 1)
	def(&c.AckWait, 30*time.Second)
	def(&c.MaxDeliver, 5)
	def(&c.MaxInFlight, 256)
	def(&c.MaxRows, 4096)
	def(&c.PullMaxMessages, max(1, c.MaxInFlight/4))
	def(&c.MaxAckPending, 4*c.MaxInFlight)
	def(&c.PullExpiry, 5*time.Second)
	def(&c.HandleTimeout, time.Minute)
	def(&c.DrainTimeout, 20*time.Second)
	def(&c.RetryDelay, time.Second)
	def(&c.RetryMaxDelay, 30*time.Second)
	def(&c.UnownedGrace, 10*time.Second)
	def(&c.OrphanGrace, min(24*time.Hour, c.MaxAge/2))
	def(&c.CheckInterval, 10*time.Second)
	def(&c.KeepSettled, 24*time.Hour)
	if c.Standing == nil {
		c.Standing = &Standing{}
	}
	if c.Healthy == nil {
		c.Healthy = func(context.Context) error { return nil }
	}
	if c.Tries == nil {
		c.Tries = &memoryTries{sums: map[schema.Delivery]schema.Tries{}}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics(nil, c.Models)
	}
	if c.Tracer == nil {
		c.Tracer = noop.NewTracerProvider().Tracer("")
	}
	return c
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// healthy reports whether messages may be pulled: the stream loses none, and what the handler needs is there.
func (c Config) healthy(ctx context.Context) error {
	if err := c.Standing.Err(ctx); err != nil {
		return err
	}
	return c.Healthy(ctx)
}

// Validate returns an error that names the first field out of its bounds. It expects defaults to be in place.
func (c Config) Validate() error {
	if len(c.Models) == 0 {
		return errors.New("consumers: Models is empty: name at least one model")
	}
	seen := map[string]bool{}
	for _, m := range c.Models {
		if !ValidModel(m) {
			return fmt.Errorf("consumers: Models: %q is not a model's name: 1 to 64 of a-z 0-9 - _, beginning with a letter", m)
		}
		if seen[m] {
			return fmt.Errorf("consumers: Models: %q is named twice", m)
		}
		seen[m] = true
	}
	for _, f := range []struct {
		name   string
		v, min int64
		unit   string
	}{
		{"MaxAge", int64(c.MaxAge), int64(time.Minute), "1m"},
		{"MaxBytes", c.MaxBytes, 1 << 20, "1 MiB"},
		{"Replicas", int64(c.Replicas), 1, "1"},
		{"AckWait", int64(c.AckWait), int64(100 * time.Millisecond), "100ms"},
		{"MaxDeliver", int64(c.MaxDeliver), 1, "1"},
		{"MaxInFlight", int64(c.MaxInFlight), 1, "1"},
		{"MaxRows", int64(c.MaxRows), 1, "1"},
		{"PullMaxMessages", int64(c.PullMaxMessages), 1, "1"},
		{"MaxAckPending", int64(c.MaxAckPending), 1, "1"},
		{"PullExpiry", int64(c.PullExpiry), int64(time.Second), "1s"},
		{"HandleTimeout", int64(c.HandleTimeout), 1, "1ns"},
		{"DrainTimeout", int64(c.DrainTimeout), 1, "1ns"},
		{"RetryDelay", int64(c.RetryDelay), 1, "1ns"},
		{"RetryMaxDelay", int64(c.RetryMaxDelay), int64(c.RetryDelay), "RetryDelay"},
		{"UnownedGrace", int64(c.UnownedGrace), 1, "1ns"},
		{"OrphanGrace", int64(c.OrphanGrace), 1, "1ns"},
		{"CheckInterval", int64(c.CheckInterval), 1, "1ns"},
		{"KeepSettled", int64(c.KeepSettled), 1, "1ns"},
	} {
		if f.v < f.min {
			return fmt.Errorf("consumers: %s is below %s", f.name, f.unit)
		}
	}
	return nil
}

// ValidModel reports whether name can be a model's: 1 to 64 of a-z 0-9 - _, beginning with a letter.
func ValidModel(name string) bool {
	if len(name) == 0 || len(name) > 64 {
		return false
	}
	for i, r := range []byte(name) {
		switch {
		case r >= 'a' && r <= 'z':
		case i > 0 && (r >= '0' && r <= '9' || r == '-' || r == '_'):
		default:
			return false
		}
	}
	return true
}

// Run consumes the configured models' events until ctx ends, then drains: it stops pulling, lets messages in flight
// come to their verdict for at most Config.DrainTimeout, and gives the rest back for another worker. It returns nil
// after a drain, else why it could not go on: a configuration out of bounds, or a stream that at the start has settings
// under which events would be lost ([ErrStreamConfig]), or no room for a new stream ([NoRoom]), or a connection that was
// closed for good. While NATS cannot be reached it waits and tries again. If settings go bad later, it pulls nothing until
// they are good again, and Config.Standing says why.
func Run(ctx context.Context, js jetstream.JetStream, cfg Config, h Handler, dead DeadLetters) error {
	cfg = cfg.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	// Work outlives ctx by the drain.
	work, abandon := context.WithCancelCause(context.WithoutCancel(ctx))
	defer abandon(nil)
	stopTimer := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(cfg.DrainTimeout, func() { abandon(errDrained) })
		context.AfterFunc(work, func() { t.Stop() })
	})
	defer stopTimer()

	r := &runner{
		js: js, conn: js.Conn(), cfg: cfg, handler: h, dead: dead,
		rows: semaphore.NewWeighted(int64(cfg.MaxRows)),
		gate: newGate(work, cfg.healthy, cfg.Logger, cfg.Metrics),
		log:  cfg.Logger,
	}
	defer r.gate.stop()

	loops := []loop{r.terminated()}
	for _, m := range cfg.Models {
		loops = append(loops, r.model(m), r.givenUp(m))
	}
	for _, l := range loops {
		cfg.Pulling.set(l.name, errNotPulling)
		group.Go(func() error { return r.consume(ctx, work, l) })
	}
	group.Go(func() error { newKeeper(r).run(ctx, work); return nil })
	err := group.Wait()
	abandon(nil)
	r.overruns.Wait()
	return err
}

var errNotConnected = errors.New("not connected to NATS")

// errDrained ends the work that a drain did not wait for.
var errDrained = errors.New("the worker is stopping")

// runner is what the loops of one Run share.
type runner struct {
	js       jetstream.JetStream
	conn     connection
	cfg      Config
	handler  Handler
	dead     DeadLetters
	rows     *semaphore.Weighted
	gate     *gate
	log      *slog.Logger
	overruns sync.WaitGroup // watches over handlers
}

// connection is what the loops ask of the connection to NATS.
type connection interface {
	IsClosed() bool
	IsConnected() bool
}

// loop is one durable consumer and what is done with its messages.
type loop struct {
	name  string
	open  func(context.Context) (source, error) // makes sure that the consumer exists
	take  func(work context.Context, msg *message, held *held)
	slots int
	pull  int
}

// consume pulls messages and hands each to l.take in a goroutine of its own, at most l.slots at once. It returns
// after the last of them has come back.
func (r *runner) consume(ctx, work context.Context, l loop) error {
	slots := newSlots(l.slots)
	beats := newHeartbeats(r.cfg.AckWait/3, r.log)
	defer beats.stop()
	defer slots.wait()

	began := false // settings that are bad from the start are refused, later ones are waited out
	retry := backoff.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for ctx.Err() == nil {
		if r.conn.IsClosed() {
			return fmt.Errorf("consumers: %w", nats.ErrConnectionClosed)
		}
		if !r.conn.IsConnected() { // a request would wait for its timeout
			r.cfg.Pulling.set(l.name, errNotConnected)
			retry.Wait(ctx)
			continue
		}
		setup, done := context.WithTimeout(ctx, 5*time.Second)
		from, err := l.open(setup)
		done()
		switch {
		case errors.Is(err, ErrStreamConfig) && !began, NoRoom(err):
			return err
		case err != nil:
			if ctx.Err() == nil {
				r.log.Warn("consumer is not available", "consumer", l.name, "err", err)
			}
			r.cfg.Pulling.set(l.name, err)
		default:
			began = true
			err = r.pull(ctx, work, l, from, slots, beats, &retry)
			if ctx.Err() == nil {
				r.log.Warn("pulling was interrupted", "consumer", l.name, "err", err)
			}
			r.cfg.Pulling.set(l.name, err)
		}
		retry.Wait(ctx)
	}
	return nil
}

// pull takes messages until ctx ends or a pull fails.
func (r *runner) pull(ctx, work context.Context, l loop, from source, slots *slots, beats *heartbeats, retry *backoff.Backoff) error {
	for {
		if !r.gate.open() {
			r.cfg.Pulling.set(l.name, errPaused)
		}
		if err := r.gate.wait(ctx); err != nil {
			return err
		}
		n, err := slots.take(ctx, l.pull)
		if err != nil {
			return err
		}
		if !r.conn.IsConnected() {
			slots.give(n)
			return errNotConnected
		}
		got, err := r.pullOnce(ctx, work, l, from, n, slots, beats)
		slots.give(n - got)
		if err != nil {
			return err
		}
		retry.Failures = 0
	}
}

// pullOnce asks for n messages and returns how many came before ctx ended or the gate was shut.
func (r *runner) pullOnce(ctx, work context.Context, l loop, from source, n int, slots *slots, beats *heartbeats) (int, error) {
	defer r.cfg.Pulling.begin(l.name)()
	ctx, opened := r.gate.during(ctx)
	defer opened()
	got := 0
	err := from.pull(ctx, n, func(msg *message) {
		got++
		h := beats.hold(msg)
		go func() {
			defer slots.give(1)
			defer h.release()
			l.take(work, msg, h)
		}()
	})
	return got, err
}

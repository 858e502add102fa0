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

// Run consumes the configured models' events until ctx ends, then drains: it stops pulling, lets messages in flight
// come to their verdict for at most Config.DrainTimeout, and gives the rest back for another worker. It returns nil
// after a drain, else why it could not go on: a configuration out of bounds, or a stream that at the start has settings
// under which events would be lost ([ErrStreamConfig]), or no room for a new stream ([NoRoom]), or a connection that was
// closed for good. While NATS cannot be reached it waits and tries again. If settings go bad later, it pulls nothing until
// they are good again, and Config.Standing says why.
func Run(ctx context.Context, js jetstream.JetStream, cfg Config, h Handler, dead DeadLetters) error {
	cfg = cfg.withDefaults()
	if err := cfg.checkModels(); err != nil {
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

// Package consumers takes events from a JetStream stream, hands each to a [Handler], and acknowledges it as the
// handler's error says: nil acknowledges it, a permanent error makes it a dead letter, and any other error has it tried
// again later.
//
// Each model has a durable pull consumer. Further consumers read the server's advisories about messages that it will
// not deliver again. A keeper watches the stream as a whole: it finds messages that nobody takes, checks that each
// message has its verdict, and purges settled messages.
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

// Handler brings events to their verdicts.
type Handler interface {
	// Plan decides how a delivered event is handled. It returns the rows of U-Net work that this costs, at least 1, and a
	// function that handles the delivery, and may be called again if it fails. Plan may wait until the event may cost its
	// rows; the event stays in flight meanwhile. The context ends when the worker is stopped. An error means that
	// something that every event needs is away: Plan is called again when it is back.
	//
	// The function returns nil once the event's verdict is committed. Its error decides what becomes of the message: an
	// error that wraps a *schema.Invalid, or has a method DeadLetterKind() schema.DeadLetterKind, makes it a dead letter.
	// If the error is [Unavailable], the message is kept until the dependency is back. After any other error the message
	// is tried again. The context ends at the event's deadline, or when a drain has run out of time.
	Plan(ctx context.Context, ev schema.Event, d schema.Delivery) (
		rows int, handle func(context.Context, schema.Delivery) error, err error)
	// DeadLetter commits v, whose DeadLetter is set. If the message, or its event, has a verdict already, that verdict
	// stands and the result is nil.
	DeadLetter(ctx context.Context, v schema.Verdict) error
}

// Runner consumes events of some models.
type Runner struct {
	js       jetstream.JetStream
	conn     connection
	cfg      Config
	handler  Handler
	rows     *semaphore.Weighted
	gate     *gate
	stop     context.Context //nolint:containedctx // ends when the worker is stopped
	log      *slog.Logger
	pulling  pulling
	settings settingsState
	overruns sync.WaitGroup // watches over handlers
}

// New returns a runner. It expects settings that [Config.Check] accepts.
func New(js jetstream.JetStream, h Handler, c Config) (*Runner, error) {
	c = c.withDefaults()
	if err := c.checkModels(); err != nil {
		return nil, err
	}
	return &Runner{
		js: js, conn: js.Conn(), cfg: c, handler: h, rows: semaphore.NewWeighted(int64(c.MaxRows)), log: c.Logger,
	}, nil
}

// Pulling returns nil if every loop of Run pulls messages. The error says why each of the other loops does not.
func (r *Runner) Pulling() error { return r.pulling.err() }

// Settings returns an error that names the settings of the stream or its consumers with which events would be lost.
func (r *Runner) Settings() error { return r.settings.get() }

// healthy returns nil if messages may be pulled: no setting would lose events, and the handler's dependencies are
// there.
func (r *Runner) healthy(ctx context.Context) error {
	if err := r.Settings(); err != nil {
		return err
	}
	return r.cfg.Healthy(ctx)
}

// Run consumes the models' events until ctx ends. Then it drains: it stops pulling, lets messages in flight come to
// their verdict for at most Config.DrainTimeout, and gives the rest back for another worker. It may be called once.
//
// Run returns nil after a drain. It fails if at its start the stream has settings with which events would be lost
// ([ErrStreamConfig]), if there is no room for a new stream ([NoRoom]), or if the connection is closed for good. While
// NATS cannot be reached it waits and tries again. If settings become bad later, it pulls nothing until they are good
// again.
func (r *Runner) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	// The context work outlives ctx by the drain.
	work, abandon := context.WithCancelCause(context.WithoutCancel(ctx))
	defer abandon(nil)
	stopTimer := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(r.cfg.DrainTimeout, func() { abandon(errDrained) })
		context.AfterFunc(work, func() { t.Stop() })
	})
	defer stopTimer()

	r.stop = ctx
	r.gate = newGate(work, r.healthy, r.log, r.cfg.Metrics)
	defer r.gate.stop()

	b := backstop{r}
	loops := []loop{b.terminated()}
	for _, m := range r.cfg.Models {
		loops = append(loops, r.model(m), b.givenUp(m))
	}
	for _, l := range loops {
		r.pulling.set(l.name, errNotPulling)
		group.Go(func() error { return r.consume(ctx, work, l) })
	}
	group.Go(func() error { newKeeper(r).run(ctx, work); return nil })
	err := group.Wait()
	abandon(nil)
	r.overruns.Wait()
	return err
}

var errNotConnected = errors.New("not connected to NATS")

// errDrained ends the work in flight when a drain has run out of time.
var errDrained = errors.New("the worker is stopping")

// connection is what the loops need of the connection to NATS.
type connection interface {
	IsClosed() bool
	IsConnected() bool
}

// loop pulls the messages of one durable consumer.
type loop struct {
	name  string
	open  func(context.Context) (source, error) // creates the consumer if it does not exist
	take  func(work context.Context, msg *message, h *heartbeat)
	slots int
	pull  int
}

// consume pulls messages and calls l.take for each in a goroutine of its own, at most l.slots at once. It returns after
// the last of them has returned.
func (r *Runner) consume(ctx, work context.Context, l loop) error {
	slots := newSlots(l.slots)
	beats := newHeartbeats(r.cfg.AckWait/3, r.log)
	defer beats.stop()
	defer slots.wait()

	began := false // bad settings are an error at the start; later they are waited out
	retry := backoff.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for ctx.Err() == nil {
		if r.conn.IsClosed() {
			return fmt.Errorf("consumers: %w", nats.ErrConnectionClosed)
		}
		if !r.conn.IsConnected() { // a request would only time out
			r.pulling.set(l.name, errNotConnected)
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
			r.pulling.set(l.name, err)
		default:
			began = true
			err = r.pull(ctx, work, l, from, slots, beats, &retry)
			if ctx.Err() == nil {
				r.log.Warn("pulling was interrupted", "consumer", l.name, "err", err)
			}
			r.pulling.set(l.name, err)
		}
		retry.Wait(ctx)
	}
	return nil
}

// pull takes messages until ctx ends or a pull fails.
func (r *Runner) pull(
	ctx, work context.Context, l loop, from source, slots *slots, beats *heartbeats, retry *backoff.Backoff,
) error {
	for {
		if !r.gate.open() {
			r.pulling.set(l.name, errPaused)
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
		if got > 0 {
			r.pulling.set(l.name, nil) // also if the next request waits for slots
		}
		retry.Failures = 0
	}
}

// pullOnce asks for n messages and returns how many came before ctx ended or the gate was shut.
func (r *Runner) pullOnce(
	ctx, work context.Context, l loop, from source, n int, slots *slots, beats *heartbeats,
) (int, error) {
	defer r.pulling.begin(l.name)()
	ctx, opened := r.gate.during(ctx)
	defer opened()
	got := 0
	err := from.pull(ctx, n, func(msg *message) {
		got++
		h := beats.start(msg)
		go func() {
			defer slots.give(1)
			defer h.stop()
			l.take(work, msg, h)
		}()
	})
	return got, err
}

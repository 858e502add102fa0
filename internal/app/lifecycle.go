package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"
)

// Lifecycle runs the parts of a program and takes them down in the opposite order of their start.
type Lifecycle struct {
	ctx   context.Context // ends when the program shall end
	fail  context.CancelCauseFunc
	log   *slog.Logger
	steps []step
	doing atomic.Value  // string: what is started or stopped now
	ended chan struct{} // closed when everything has stopped
}

// step undoes one start.
type step struct {
	name string
	undo func() error
}

// NewLifecycle returns a lifecycle and its context, which ends with ctx or when a part ends by itself.
func NewLifecycle(ctx context.Context, log *slog.Logger) (*Lifecycle, context.Context) {
	ctx, fail := context.WithCancelCause(ctx)
	l := &Lifecycle{ctx: ctx, fail: fail, log: log, ended: make(chan struct{})}
	l.doing.Store("start")
	return l, ctx
}

// exitMargin is how much longer than its drain a process takes to end, at most.
const exitMargin = 10 * time.Second

// Bound ends the process, with a log line that names what hangs, if it still runs limit after it should have ended. A C
// call that does not return cannot hold it up.
func (l *Lifecycle) Bound(limit time.Duration) {
	context.AfterFunc(l.ctx, func() {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		select {
		case <-timer.C:
			l.log.Error("exiting although not everything has stopped", "after", limit, "hangs", l.doing.Load())
			os.Exit(1)
		case <-l.ended:
		}
	})
}

// OnStop has f called when the program ends, before everything that was registered earlier.
func (l *Lifecycle) OnStop(name string, f func() error) {
	l.steps = append(l.steps, step{name, f})
}

// Run starts a part that runs until its context ends. When the program ends it is told so and waited for. A part that
// ends by itself ends the program.
//
//nolint:contextcheck // a part outlives the context of whoever starts it
func (l *Lifecycle) Run(name string, f func(context.Context) error) {
	// Not below l.ctx: the part ends when its turn comes.
	ctx, cancel := context.WithCancel(context.WithoutCancel(l.ctx))
	done := make(chan error, 1)
	go func() {
		err := f(ctx)
		if ctx.Err() == nil {
			l.fail(fmt.Errorf("%s ended: %w", name, orUnexpected(err)))
		}
		done <- err
	}()
	l.OnStop(name, func() error {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
}

func orUnexpected(err error) error {
	if err == nil {
		return errors.New("for no reason")
	}
	return err
}

// Wait waits until the program shall end. The error is that of a part that ended by itself.
func (l *Lifecycle) Wait() error {
	<-l.ctx.Done()
	if cause := context.Cause(l.ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// End stops everything, the last first, and joins the errors to *err. Defer it right after [NewLifecycle].
func (l *Lifecycle) End(err *error) {
	l.fail(nil)
	defer close(l.ended)
	for _, s := range slices.Backward(l.steps) {
		start := time.Now()
		l.doing.Store("stop of " + s.name)
		if stop := s.undo(); stop != nil {
			l.log.Error("part did not stop as it should", "part", s.name, "err", stop)
			*err = errors.Join(*err, fmt.Errorf("stop %s: %w", s.name, stop))
		}
		l.log.Debug("stopped", "part", s.name, "took", time.Since(start))
	}
	l.steps = nil
}

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
	ctx   context.Context // ends when the program must end
	fail  context.CancelCauseFunc
	log   *slog.Logger
	steps []step
	doing atomic.Value  // string: what starts or stops now
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

// Bound exits the process, with a log line that names what hangs, if it still runs limit after it should have ended.
// Even a C call that does not return cannot delay that.
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

// OnStop registers f to be called when the program ends, before everything that was registered earlier.
func (l *Lifecycle) OnStop(name string, f func() error) {
	l.steps = append(l.steps, step{name, f})
}

// Run starts a part. When the program ends, the part's context is canceled, and its return is waited for. A part that
// returns by itself ends the program.
//
//nolint:contextcheck // a part outlives the context of whoever starts it
func (l *Lifecycle) Run(name string, f func(context.Context) error) {
	// Not a child of l.ctx: the part ends when its turn comes.
	ctx, cancel := context.WithCancel(context.WithoutCancel(l.ctx))
	done := make(chan error, 1)
	go func() {
		err := f(ctx)
		if ctx.Err() == nil {
			if err == nil {
				err = errors.New("exited unexpectedly")
			}
			l.fail(fmt.Errorf("%s: %w", name, err))
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

// Wait waits until the program must end, and returns the error of the part that ended it, if one did.
func (l *Lifecycle) Wait() error {
	<-l.ctx.Done()
	if cause := context.Cause(l.ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// Ended returns err, the error of a start. If the start failed because the program must end, it returns what ended the
// program instead, as Wait does.
func (l *Lifecycle) Ended(err error) error {
	if l.ctx.Err() != nil {
		return l.Wait()
	}
	return err
}

// End stops everything, the last first, and joins the errors to *err. Defer it right after [NewLifecycle].
func (l *Lifecycle) End(err *error) {
	l.fail(nil)
	defer close(l.ended)
	for _, s := range slices.Backward(l.steps) {
		start := time.Now()
		l.doing.Store("stop of " + s.name)
		if stop := s.undo(); stop != nil {
			l.log.Error("part did not stop cleanly", "part", s.name, "err", stop)
			*err = errors.Join(*err, fmt.Errorf("stop %s: %w", s.name, stop))
		}
		l.log.Debug("stopped", "part", s.name, "took", time.Since(start))
	}
	l.steps = nil
}

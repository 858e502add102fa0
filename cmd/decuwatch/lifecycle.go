package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

// lifecycle runs the parts of a program and takes them down in the opposite order of their start.
type lifecycle struct {
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

// newLifecycle returns a lifecycle whose context ends with ctx, or when a part ends by itself.
func newLifecycle(ctx context.Context, log *slog.Logger) *lifecycle {
	ctx, fail := context.WithCancelCause(ctx)
	l := &lifecycle{ctx: ctx, fail: fail, log: log, ended: make(chan struct{})}
	l.doing.Store("start")
	return l
}

// exitMargin is how much longer than its drain a process takes to end, at most.
const exitMargin = 10 * time.Second

// bound ends the process, with a log line that names what hangs, if it still runs limit after it should have ended. A C
// call that does not return cannot hold it up.
func (l *lifecycle) bound(limit time.Duration) {
	context.AfterFunc(l.ctx, func() {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		select {
		case <-timer.C:
			l.log.Error("exiting although not everything has stopped", "after", limit, "hangs", l.doing.Load())
			os.Exit(exitFailed)
		case <-l.ended:
		}
	})
}

// undo has f called when the program ends, before everything that was registered earlier.
func (l *lifecycle) undo(name string, f func() error) {
	l.steps = append(l.steps, step{name, f})
}

// run starts a part that runs until its context ends. When the program ends it is told so and waited for. A part that
// ends by itself ends the program.
//
//nolint:contextcheck // a part outlives the context of whoever starts it
func (l *lifecycle) run(name string, f func(context.Context) error) {
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
	l.undo(name, func() error {
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

// wait waits until the program shall end. The error is that of a part that ended by itself.
func (l *lifecycle) wait() error {
	<-l.ctx.Done()
	if cause := context.Cause(l.ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// end takes everything down, the last first, and joins the errors.
func (l *lifecycle) end() error {
	l.fail(nil)
	defer close(l.ended)
	var errs []error
	for i := len(l.steps) - 1; i >= 0; i-- {
		s := l.steps[i]
		start := time.Now()
		l.doing.Store("stop of " + s.name)
		if err := s.undo(); err != nil {
			l.log.Error("part did not stop as it should", "part", s.name, "err", err)
			errs = append(errs, fmt.Errorf("stop %s: %w", s.name, err))
		}
		l.log.Debug("stopped", "part", s.name, "took", time.Since(start))
	}
	l.steps = nil
	return errors.Join(errs...)
}

// joinEnd takes life down and joins its errors to err.
func joinEnd(err error, life *lifecycle) error { return errors.Join(err, life.end()) }

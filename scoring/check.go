package scoring

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
	"github.com/decuwatch/decuwatch/scoring/ort"
)

// DeviceError is returned if a request fails and the probe fails, too. The probe is a fixed row whose output was
// finite when the engine was opened. So the device is broken, and the request is not to blame.
type DeviceError struct{ err error }

func (e *DeviceError) Error() string { return "the device is broken: " + e.err.Error() }
func (e *DeviceError) Unwrap() error { return e.err }

// Unavailable returns true: the request may be tried again once the device works.
func (e *DeviceError) Unavailable() bool { return true }

var errProbe = errors.New("the probe's output is not finite")

// A run counts as hung after hangFactor times the longest run at start-up, but not before hangLeast.
const (
	hangFactor = 20
	hangLeast  = 10 * time.Second
)

// probe is one run of the probe, shared by all callers that asked before it began.
type probe struct {
	done chan struct{}
	err  error
}

// Check returns nil if every session of the backbone works: its last run was good and ended less than fresh ago, or
// one is in progress and not hung, or a run of the probe succeeds before ctx ends. Any number of callers cause one run
// at a time.
func (e *Engine) Check(ctx context.Context, fresh time.Duration) error {
	for i, w := range e.sampler.workers {
		if err := e.sampler.check(ctx, w, fresh); err != nil {
			if len(e.sampler.workers) > 1 {
				err = fmt.Errorf("session %d: %w", i+1, err)
			}
			return &DeviceError{err}
		}
	}
	return nil
}

func (s *sampler) check(ctx context.Context, w *worker, fresh time.Duration) error {
	s.mu.Lock()
	running := time.Duration(0)
	if w.busy {
		running = time.Since(w.began)
	}
	good, last := !w.good.IsZero() && time.Since(w.good) < fresh, w.failed
	s.mu.Unlock()
	switch {
	case running > s.hang:
		return fmt.Errorf("a run of the backbone has not returned for %s", running.Round(time.Millisecond))
	case last == nil && (good || running > 0 && fresh > 0):
		return nil
	}
	return s.ask(ctx, w)
}

// ask waits for a run of the probe on w that begins after the call.
func (s *sampler) ask(ctx context.Context, w *worker) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	if w.probe == nil {
		w.probe = &probe{done: make(chan struct{})}
		s.wake.Broadcast()
	}
	p := w.probe
	s.mu.Unlock()
	began := time.Now()
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("the probe did not return within %s: %w", time.Since(began).Round(time.Millisecond), ctx.Err())
	}
}

// runProbe runs the probe on the worker whose goroutine calls it.
func (s *sampler) runProbe(w *worker) error {
	copy(w.latent, s.probeLatent)
	copy(w.context, s.embedding(0, 0))
	w.timestep[0] = s.probeTimestep
	err := w.Run(s.pad(1))
	for errors.Is(err, ort.ErrTerminated) && !s.isClosed() {
		err = w.Run(s.pad(1))
	}
	if err != nil {
		return err
	}
	sum := 0.0
	for _, v := range w.output[:s.ensemble.Latent.Size()] {
		sum += float64(v)
	}
	if math.IsNaN(sum) || math.IsInf(sum, 0) {
		return errProbe
	}
	return nil
}

func (s *sampler) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// newProbe draws the probe's first latent.
func (s *sampler) newProbe() {
	noise := diffusion.Decuwatch{}
	s.probeLatent = make([]float32, s.ensemble.Latent.Size())
	noise.Draw(s.probeLatent)
	s.probeTimestep = int64(s.ensemble.Diffusion.TrainTimesteps - 1)
}

// judge returns the error of a task. Output that is not finite is the request's fault if the session's probe is
// finite, else the device's.
func (s *sampler) judge(ctx context.Context, t *task) error {
	var nonFinite *NonFiniteError
	if !errors.As(t.err, &nonFinite) {
		return t.err
	}
	switch err := s.ask(ctx, t.spoiled); {
	case err == nil:
		return t.err
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, ErrClosed):
		return err
	default:
		return &DeviceError{fmt.Errorf("%v, and %w", t.err, err)} // not a NonFiniteError: that is about the request
	}
}

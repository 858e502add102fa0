package scoring

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
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

// end gives the probe's result to those who wait for it.
func (p *probe) end(err error) {
	if errors.Is(err, ort.ErrTerminated) { // by close
		err = ErrClosed
	}
	p.err = err
	close(p.done)
}

// vitals say how the sessions of one goroutine fare. The goroutine's mutex guards them.
type vitals struct {
	mu     *sync.Mutex
	wake   func()        // makes the goroutine look for a probe
	what   string        // it runs
	hang   time.Duration // after which a run counts as hung
	closed bool

	busy   bool
	began  time.Time // of the run in progress
	good   time.Time // end of the last run whose outputs were all finite
	failed error     // of the last run; nil if it was good
	probe  *probe    // that is asked for and has not begun
}

// Check returns nil if every session that scores need works: its last run was good and ended less than fresh ago, or
// one is in progress and not hung, or a run of the probe succeeds before ctx ends. Any number of callers cause one run
// at a time.
func (e *Engine) Check(ctx context.Context, fresh time.Duration) error {
	for i, w := range e.sampler.workers {
		if err := w.check(ctx, fresh); err != nil {
			if len(e.sampler.workers) > 1 {
				err = fmt.Errorf("session %d: %w", i+1, err)
			}
			return &DeviceError{err}
		}
	}
	if e.fixed.ImageRisk == (Measure{}) {
		return nil // only evidence needs the decoder
	}
	if err := e.imager.check(ctx, fresh); err != nil {
		return &DeviceError{fmt.Errorf("%s: %w", e.imager.what, err)}
	}
	return nil
}

func (v *vitals) check(ctx context.Context, fresh time.Duration) error {
	v.mu.Lock()
	running := v.age()
	good, last := !v.good.IsZero() && time.Since(v.good) < fresh, v.failed
	v.mu.Unlock()
	switch {
	case running > v.hang:
		return fmt.Errorf("a run of the %s has not returned for %s", v.what, running.Round(time.Millisecond))
	case last == nil && (good || running > 0 && fresh > 0):
		return nil
	}
	return v.ask(ctx)
}

// age returns how long the run in progress has taken, or 0. The caller holds the mutex.
func (v *vitals) age() time.Duration {
	if !v.busy {
		return 0
	}
	return time.Since(v.began)
}

// ask waits for a run of the probe that begins after the call.
func (v *vitals) ask(ctx context.Context) error {
	v.mu.Lock()
	if v.closed {
		v.mu.Unlock()
		return ErrClosed
	}
	if v.probe == nil {
		v.probe = &probe{done: make(chan struct{})}
		v.wake()
	}
	p := v.probe
	v.mu.Unlock()
	began := time.Now()
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("the probe did not return within %s: %w", time.Since(began).Round(time.Millisecond), ctx.Err())
	}
}

// start begins a run, which is one of the probe if that is returned. The caller holds the mutex.
func (v *vitals) start() *probe {
	v.busy, v.began = true, time.Now()
	p := v.probe
	v.probe = nil
	return p
}

// ended records how a run ended that had outputs for so many, some of them bad. The caller holds the mutex.
func (v *vitals) ended(err error, outputs, bad int) {
	v.busy = false
	if errors.Is(err, ort.ErrTerminated) {
		return
	}
	if err == nil && outputs > 0 && bad == outputs {
		err = errors.New("no output of the last run was finite")
	}
	if v.failed = err; err == nil && bad == 0 {
		v.good = time.Now()
	}
}

// shut refuses probes from now on. The caller holds the mutex.
func (v *vitals) shut() {
	v.closed = true
	if v.probe != nil {
		v.probe.end(ErrClosed)
		v.probe = nil
	}
}

func (v *vitals) setHang(d time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.hang = d
}

func (v *vitals) isClosed() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.closed
}

// blame returns the error of a request whose rows were in these sessions. Output that is not finite is the request's
// fault if the probe is finite, else the device's.
func (v *vitals) blame(ctx context.Context, failed error) error {
	var nonFinite *NonFiniteError
	if !errors.As(failed, &nonFinite) {
		return failed
	}
	switch err := v.ask(ctx); {
	case err == nil:
		return failed
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, ErrClosed):
		return err
	default:
		return &DeviceError{fmt.Errorf("%v, and %w", failed, err)} // not a NonFiniteError: that is about the request
	}
}

// ErrHung is returned by Close if a run did not return; its session is left as it is.
var ErrHung = errors.New("a run does not return")

// closeWait is how long await waits for runs that were terminated.
const closeWait = 3 * time.Second

// await waits for goroutines whose runs were terminated. The error is ErrHung if they do not end.
func await(owners *sync.WaitGroup, what string) error {
	ended := make(chan struct{})
	go func() {
		owners.Wait()
		close(ended)
	}()
	timer := time.NewTimer(closeWait)
	defer timer.Stop()
	select {
	case <-ended:
		return nil
	case <-timer.C:
		return fmt.Errorf("%w: %s, terminated %s ago", ErrHung, what, closeWait)
	}
}

// runProbe runs the probe on the worker whose goroutine calls it.
func (s *sampler) runProbe(w *worker) error {
	copy(w.latent, probeLatent(s.ensemble))
	copy(w.context, s.ensemble.Members().Row(0, 0))
	for k, more := range s.ensemble.Members().More() {
		copyRow(w.more[k], 0, more.Row(0, 0))
	}
	w.timestep.set(0, float64(s.ensemble.Diffusion.TrainTimesteps-1))
	err := w.Run(s.pad(1))
	for errors.Is(err, ort.ErrTerminated) && !w.isClosed() {
		err = w.Run(s.pad(1))
	}
	if err != nil {
		return err
	}
	if !finite(w.output[:s.ensemble.Latent.Size()]) {
		return errProbe
	}
	return nil
}

// probeLatent returns the latent that probes run.
func probeLatent(e *ensemble.Ensemble) []float32 {
	noise, latent := diffusion.Decuwatch{}, make([]float32, e.Latent.Size())
	noise.Draw(latent)
	return latent
}

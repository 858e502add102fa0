package scoring

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// While a run hangs, requests fail at their deadline and the session counts as broken; when it returns, all is well.
func TestHungRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 4, 1, nil)
		g := newGate()
		workers[0].before = g.before
		score := func(key string) time.Duration {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			began := time.Now()
			if _, err := e.Score(ctx, Request{Key: key}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", key, err)
			}
			return time.Since(began)
		}
		done := make(chan time.Duration)
		go func() { done <- score("in the run") }()
		<-g.entered
		if took := <-done; took != 3*time.Second {
			t.Errorf("the request in the hung run took %s", took)
		}
		if workers[0].terminated.Load() != 1 {
			t.Error("the run was not terminated")
		}
		if took := score("behind the run"); took != 3*time.Second {
			t.Errorf("the request behind the hung run took %s", took)
		}
		time.Sleep(hangLeast)
		var device *DeviceError
		if err := e.Check(t.Context(), time.Hour); !errors.As(err, &device) ||
			!strings.Contains(err.Error(), "has not returned for 16s") {
			t.Errorf("check: %v", err)
		}
		workers[0].before = nil
		g.leave <- struct{}{}
		synctest.Wait()
		if err := e.Check(t.Context(), 0); err != nil {
			t.Errorf("check after the hang: %v", err)
		}
		if _, err := e.Score(t.Context(), Request{Key: "after"}); err != nil {
			t.Error(err)
		}
		if v := testutil.ToFloat64(e.sampler.metrics.requests); v != 0 {
			t.Errorf("%v requests are left", v)
		}
	})
}

// A probe that hangs is asked for once, however many wait for it, and each waits no longer than its deadline.
func TestHungProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 4, 1, nil)
		g := newGate()
		workers[0].before = g.before
		var waiting sync.WaitGroup
		for range 20 {
			waiting.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				if err := e.Check(ctx, 0); err == nil || !strings.Contains(err.Error(), "the probe did not return within 2s") {
					t.Errorf("check: %v", err)
				}
			})
		}
		if rows := <-g.entered; rows != 1 {
			t.Errorf("the probe has %d rows", rows)
		}
		waiting.Wait()
		workers[0].before = func(int) error { return nil }
		g.leave <- struct{}{}
		if err := e.Check(t.Context(), 0); err != nil {
			t.Error(err)
		}
	})
}

// Close does not wait for a run that never returns, and says so.
func TestCloseWithHungRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 4, 1, nil)
		g := newGate()
		workers[0].before = g.before
		ctx, cancel := context.WithCancel(t.Context())
		s := e.start(ctx, Request{Key: "a"})
		<-g.entered
		cancel()
		<-s.done
		if err := e.Close(); !errors.Is(err, ErrHung) {
			t.Errorf("close: %v", err)
		}
		g.leave <- struct{}{}
	})
}

// If the probe is not finite either, it is the device: no request is called bad, and few probes are run.
func TestNonFiniteDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 64, 1, nil)
		l, probes := workers[0], 0
		broken := true
		l.runner = spoiler{l, func(rows int) {
			if rows == 1 {
				probes++
			}
			for i := range l.output {
				if broken {
					l.output[i] = float32(math.NaN())
				}
			}
			time.Sleep(time.Millisecond)
		}}
		var requests sync.WaitGroup
		for i := range 20 {
			requests.Go(func() {
				_, err := e.Score(t.Context(), Request{Key: fmt.Sprint(i), Profile: profileOf(10, 2, 3, 5)})
				var device *DeviceError
				var nonFinite *NonFiniteError
				if !errors.As(err, &device) || !device.Unavailable() || errors.As(err, &nonFinite) {
					t.Errorf("request %d: %v", i, err)
				}
			})
		}
		requests.Wait()
		if probes == 0 || probes > 6 {
			t.Errorf("20 requests ran %d probes", probes)
		}
		if err := e.Check(t.Context(), time.Hour); !errors.Is(err, errProbe) {
			t.Errorf("check: %v", err)
		}
		broken = false
		if err := e.Check(t.Context(), time.Hour); err != nil {
			t.Error(err)
		}
		if _, err := e.Score(t.Context(), Request{Key: "after"}); err != nil {
			t.Error(err)
		}
	})
}

// A session that was good a moment ago is not probed; one whose last run failed is.
func TestRecentSuccessCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 64, 1, nil)
		runs := 0
		var failing error
		workers[0].before = func(int) error { runs++; return failing }
		if _, err := e.Score(t.Context(), Request{Key: "a"}); err != nil {
			t.Fatal(err)
		}
		before := runs
		if err := e.Check(t.Context(), time.Minute); err != nil || runs != before {
			t.Errorf("%v, %d runs", err, runs-before)
		}
		time.Sleep(time.Minute)
		if err := e.Check(t.Context(), time.Minute); err != nil || runs != before+1 {
			t.Errorf("a minute later: %v, %d runs", err, runs-before)
		}
		failing = errors.New("out of memory")
		if _, err := e.Score(t.Context(), Request{Key: "a"}); !errors.Is(err, failing) {
			t.Errorf("%v", err)
		}
		if err := e.Check(t.Context(), time.Minute); !errors.Is(err, failing) {
			t.Errorf("after a failed run: %v", err)
		}
	})
}

package backoff

import (
	"context"
	"math"
	"testing"
	"testing/synctest"
	"time"
)

func TestAfter(t *testing.T) {
	for _, c := range []struct {
		failures       int
		first, longest time.Duration
		want           time.Duration
	}{
		{0, time.Second, time.Minute, time.Second},
		{1, time.Second, time.Minute, time.Second},
		{2, time.Second, time.Minute, 2 * time.Second},
		{6, time.Second, time.Minute, 32 * time.Second},
		{7, time.Second, time.Minute, time.Minute},
		{1 << 20, time.Second, time.Minute, time.Minute},
		{1 << 20, time.Second, math.MaxInt64, math.MaxInt64},
		{1, time.Minute, time.Second, time.Second},
	} {
		if got := After(c.failures, c.first, c.longest); got != c.want {
			t.Errorf("After(%d, %s, %s) = %s, want %s", c.failures, c.first, c.longest, got, c.want)
		}
	}
}

func TestWaitDoubles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := Backoff{Min: time.Second, Max: 4 * time.Second}
		for _, longest := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 4 * time.Second} {
			start := time.Now()
			b.Wait(t.Context())
			if took := time.Since(start); took < longest/2 || took > longest {
				t.Errorf("waited %s, want %s to %s", took, longest/2, longest)
			}
		}
		b.Failures = 0
		start := time.Now()
		b.Wait(t.Context())
		if took := time.Since(start); took > time.Second {
			t.Errorf("waited %s after a success", took)
		}
	})
}

func TestWaitEndsWithContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		(&Backoff{Min: time.Hour, Max: time.Hour}).Wait(ctx)
		if took := time.Since(start); took != time.Second {
			t.Errorf("waited %s, want 1s", took)
		}
	})
}

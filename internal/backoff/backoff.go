// Package backoff spaces out retries: the delay doubles with each failure in a row, up to a maximum.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff spaces out the retries of one operation.
type Backoff struct {
	Min, Max time.Duration // delay after the first failure, and the longest delay
	Failures int           // failures in a row so far; set it to 0 after a success
}

// Next counts a failure and returns how long to wait before the next try: the delay, or up to half of it less.
func (b *Backoff) Next() time.Duration {
	b.Failures++
	return Jitter(After(b.Failures, b.Min, b.Max))
}

// Wait counts a failure and waits before the next try, or until ctx ends.
func (b *Backoff) Wait(ctx context.Context) { Sleep(ctx, b.Next()) }

// After returns the delay after a number of failures in a row.
func After(failures int, first, longest time.Duration) time.Duration {
	d := first
	for ; failures > 1 && 0 < d && d < longest; failures-- {
		d *= 2
	}
	if d <= 0 { // overflow
		return longest
	}
	return min(d, longest)
}

// Jitter returns a duration between d/2 and d, so that many workers do not act at the same moment.
func Jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// Sleep waits for d, or until ctx ends.
func Sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

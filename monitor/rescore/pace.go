package rescore

import (
	"context"
	"sync"
	"time"

	"github.com/decuwatch/decuwatch/internal/backoff"
)

// pacer bounds the time that a target takes from live work on another engine.
type pacer struct {
	busy  func() bool // nil: never
	share float64
	one   sync.Mutex // held by who works while live work is busy

	mu   sync.Mutex
	next time.Time // not before, while live work is busy
}

// idle is how often a pacer looks whether live work is over.
const idle = 20 * time.Millisecond

// begin waits until work may begin. The returned function is called with the time that the work took.
func (p *pacer) begin(ctx context.Context) (end func(took time.Duration)) {
	if p.busy == nil || !p.busy() {
		return p.spent
	}
	p.one.Lock()
	for ctx.Err() == nil && p.busy() && time.Now().Before(p.due()) {
		backoff.Sleep(ctx, idle)
	}
	return func(took time.Duration) {
		p.spent(took)
		p.one.Unlock()
	}
}

func (p *pacer) due() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.next
}

// spent puts off the next work, so that no more than the share of the time is taken while live work is busy.
func (p *pacer) spent(took time.Duration) {
	if p.busy == nil || took == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next = time.Now().Add(time.Duration(float64(took) * (1/p.share - 1)))
}

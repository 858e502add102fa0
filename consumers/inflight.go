package consumers

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// slots bounds the messages that one loop has in flight.
type slots struct {
	size int
	free *semaphore.Weighted
}

func newSlots(size int) *slots { return &slots{size: size, free: semaphore.NewWeighted(int64(size))} }

// take waits for one slot, takes further free ones, at most n in all, and returns how many it took.
func (s *slots) take(ctx context.Context, n int) (int, error) {
	if err := s.free.Acquire(ctx, 1); err != nil {
		return 0, err
	}
	taken := 1
	for step := n - 1; step > 0 && taken < n; {
		if s.free.TryAcquire(int64(step)) {
			taken += step
			step = n - taken
			continue
		}
		step /= 2
	}
	return taken, nil
}

func (s *slots) give(n int) { s.free.Release(int64(n)) }

// wait waits until all slots are free. No slot may be taken afterwards.
//
//nolint:contextcheck // messages are finished although pulling has ended
func (s *slots) wait() { _ = s.free.Acquire(context.Background(), int64(s.size)) }

// heartbeats tells the server, at an interval, that messages are still being worked on.
type heartbeats struct {
	log   *slog.Logger
	every time.Duration
	done  chan struct{}
	ended sync.WaitGroup

	mu      sync.Mutex
	running map[*heartbeat]struct{}
}

// heartbeat keeps one message in flight, from its arrival to its acknowledgement.
type heartbeat struct {
	msg   interface{ progress() error }
	since time.Time // of the arrival, or of the last heartbeat
	beats *heartbeats
	late  bool // the handler did not return in time
}

func newHeartbeats(every time.Duration, log *slog.Logger) *heartbeats {
	h := &heartbeats{log: log, every: every, done: make(chan struct{}), running: map[*heartbeat]struct{}{}}
	h.ended.Go(h.run)
	return h
}

func (h *heartbeats) stop() {
	close(h.done)
	h.ended.Wait()
}

// start keeps msg in flight until the result is stopped.
func (h *heartbeats) start(msg interface{ progress() error }) *heartbeat {
	b := &heartbeat{msg: msg, since: time.Now(), beats: h}
	h.mu.Lock()
	h.running[b] = struct{}{}
	h.mu.Unlock()
	return b
}

// stop ends the heartbeats; none is sent after it returns. It may be called again.
func (b *heartbeat) stop() {
	b.beats.mu.Lock()
	delete(b.beats.running, b)
	b.beats.mu.Unlock()
}

// overrun ends the heartbeats because the handler does not return: another worker gets the message.
func (b *heartbeat) overrun() {
	b.beats.mu.Lock()
	b.late = true
	delete(b.beats.running, b)
	b.beats.mu.Unlock()
}

// overran reports whether another worker gets the message.
func (b *heartbeat) overran() bool {
	b.beats.mu.Lock()
	defer b.beats.mu.Unlock()
	return b.late
}

func (h *heartbeats) run() {
	// The ticker is twice as fast as the interval, so that no message waits for more than 1.5 intervals.
	tick := time.NewTicker(h.every / 2)
	defer tick.Stop()
	for {
		select {
		case <-h.done:
			return
		case now := <-tick.C:
			h.beat(now)
		}
	}
}

func (h *heartbeats) beat(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for b := range h.running {
		if now.Sub(b.since) < h.every {
			continue
		}
		if err := b.msg.progress(); err != nil {
			h.log.Debug("heartbeat failed", "err", err)
			continue
		}
		b.since = now
	}
}

package consumers

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// slots bounds the messages that one loop holds.
type slots struct {
	size int
	free *semaphore.Weighted
}

func newSlots(size int) *slots { return &slots{size: size, free: semaphore.NewWeighted(int64(size))} }

// take waits for one slot and returns how many it took, at most n, all that were free.
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

// wait waits until all slots are free. No slot may be taken after.
//
//nolint:contextcheck // messages are finished although pulling has ended
func (s *slots) wait() { _ = s.free.Acquire(context.Background(), int64(s.size)) }

// heartbeats tells the server at an interval that the messages held are still being worked on.
type heartbeats struct {
	log   *slog.Logger
	every time.Duration
	done  chan struct{}
	ended sync.WaitGroup

	mu   sync.Mutex
	held map[*held]struct{}
}

// held is one message from its arrival to its acknowledgement.
type held struct {
	msg   interface{ progress() error }
	since time.Time // of its arrival, or of the last heartbeat
	beats *heartbeats
	late  bool // its handler did not return in time
}

func newHeartbeats(every time.Duration, log *slog.Logger) *heartbeats {
	h := &heartbeats{log: log, every: every, done: make(chan struct{}), held: map[*held]struct{}{}}
	h.ended.Go(h.run)
	return h
}

func (h *heartbeats) stop() {
	close(h.done)
	h.ended.Wait()
}

// hold keeps msg alive until the result is released.
func (h *heartbeats) hold(msg interface{ progress() error }) *held {
	m := &held{msg: msg, since: time.Now(), beats: h}
	h.mu.Lock()
	h.held[m] = struct{}{}
	h.mu.Unlock()
	return m
}

// release ends the heartbeats of m; after it none is sent. Releasing twice does nothing.
func (m *held) release() {
	m.beats.mu.Lock()
	delete(m.beats.held, m)
	m.beats.mu.Unlock()
}

// overrun ends the heartbeats of m because its handler does not return.
func (m *held) overrun() {
	m.beats.mu.Lock()
	m.late = true
	delete(m.beats.held, m)
	m.beats.mu.Unlock()
}

// overran reports whether m was left to another worker.
func (m *held) overran() bool {
	m.beats.mu.Lock()
	defer m.beats.mu.Unlock()
	return m.late
}

func (h *heartbeats) run() {
	// Twice as often as the interval, so that no message waits for more than 1.5 intervals.
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
	for m := range h.held {
		if now.Sub(m.since) < h.every {
			continue
		}
		if err := m.msg.progress(); err != nil {
			h.log.Debug("heartbeat failed", "err", err)
			continue
		}
		m.since = now
	}
}

package consumers_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// Events whose plan waits keep their delivery, hold no rows, and let others pass. The backlog is reported meanwhile.
func TestPlanMayWait(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("wait", 10)...)
	publish(t, js, ids("go", 10)...)
	r := newRecorder()
	room := make(chan struct{})
	r.plan = func(ctx context.Context, ev schema.Event) error {
		if ev.ID[0] != 'w' {
			return nil
		}
		select {
		case <-room:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	cfg := config()
	cfg.AckWait, cfg.MaxRows, cfg.HandleTimeout = 600*time.Millisecond, 1, time.Second
	cfg.Stream.CheckInterval = time.Second
	var backlog atomic.Pointer[consumers.Backlog]
	cfg.Backlog = func(of string, b consumers.Backlog) {
		if of == model {
			backlog.Store(&b)
		}
	}
	run(t, js, cfg, r)
	natstest.Until(t, "the others pass", func() bool { done, _ := r.count(); return done == 10 })
	start := time.Now()
	natstest.Until(t, "AckWait and HandleTimeout have passed", func() bool { return time.Since(start) > 2*time.Second })
	natstest.Until(t, "the backlog is reported", func() bool {
		b := backlog.Load()
		return b != nil && b.Events == 10 && b.Oldest > 2*time.Second && b.MaxAge == 168*time.Hour
	})
	close(room)
	settled(t, stream)
	if done, deadLetters := r.count(); done != 20 || deadLetters != 0 {
		t.Errorf("%d events are done, %d dead letters", done, deadLetters)
	}
	for id, deliveries := range r.handled {
		if len(deliveries) != 1 || deliveries[0].Delivered != 1 {
			t.Errorf("event %s: deliveries %+v", id, deliveries)
		}
	}
}

// A plan that fails says nothing about its event: pulling is paused, and the event is planned again.
func TestPlanThatFailsIsMadeAgain(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("e", 10)...)
	r := newRecorder()
	var plans atomic.Int64
	r.plan = func(context.Context, schema.Event) error {
		if plans.Add(1) < 40 {
			return errors.New("the database is away")
		}
		return nil
	}
	cfg := config()
	cfg.MaxDeliver = 1
	run(t, js, cfg, r)
	settled(t, stream)
	if done, deadLetters := r.count(); done != 10 || deadLetters != 0 {
		t.Errorf("%d events are done, %d dead letters", done, deadLetters)
	}
	for id, deliveries := range r.handled {
		if deliveries[0].Delivered != 1 {
			t.Errorf("event %s used %d deliveries", id, deliveries[0].Delivered)
		}
	}
}

// A worker that is stopped hands waiting events back at once, however long a drain may take, and that is noted.
func TestStopHandsWaitingEventsBack(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("e", 5)...)
	r := newRecorder()
	var waiting atomic.Int64
	r.plan = func(ctx context.Context, _ schema.Event) error {
		waiting.Add(1)
		<-ctx.Done()
		return ctx.Err()
	}
	cfg := config()
	cfg.DrainTimeout, cfg.MaxDeliver = time.Minute, 1
	noted := newTries()
	cfg.Tries = noted
	w := run(t, js, cfg, r)
	natstest.Until(t, "all events wait", func() bool { return waiting.Load() == 5 })
	start := time.Now()
	if err := w.wait(); err != nil || time.Since(start) > cfg.DrainTimeout/2 {
		t.Errorf("stopped after %s: %v", time.Since(start), err)
	}
	for sequence := range uint64(5) {
		if sum := noted.sums[sequence+1]; sum != (schema.Tries{HandedBack: 1}) {
			t.Errorf("message %d: %+v", sequence+1, sum)
		}
	}
	other := newRecorder()
	run(t, js, cfg, other)
	settled(t, stream)
	if done, deadLetters := other.count(); done != 5 || deadLetters != 0 {
		t.Errorf("another worker did %d events, %d dead letters", done, deadLetters)
	}
}

// A worker whose slots are all taken by waiting events pulls as it should.
func TestWaitingEventsAreNoTrouble(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("e", 20)...)
	r := newRecorder()
	room, waiting := make(chan struct{}), atomic.Int64{}
	r.plan = func(ctx context.Context, _ schema.Event) error {
		waiting.Add(1)
		select {
		case <-room:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	cfg := config()
	cfg.MaxInFlight = 4
	runner := newRunner(t, js, cfg, r)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- runner.Run(ctx) }()
	natstest.Until(t, "all slots are taken, and the worker pulls", func() bool {
		return waiting.Load() == 4 && runner.Pulling() == nil
	})
	close(room)
	settled(t, stream)
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

package consumers_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// tries counts attempts as the database does, for workers that run one after the other.
type tries struct {
	mu   sync.Mutex
	sums map[uint64]schema.Tries
}

func newTries() *tries { return &tries{sums: map[uint64]schema.Tries{}} }

func (t *tries) Try(_ context.Context, d schema.Delivery, add schema.Tries) (schema.Tries, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.sums[d.Sequence]
	s = schema.Tries{
		Failed: max(0, s.Failed+add.Failed), HandedBack: max(0, s.HandedBack+add.HandedBack),
		Watched: max(0, s.Watched+add.Watched), Alone: max(0, s.Alone+add.Alone),
	}
	t.sums[d.Sequence] = s
	return s, nil
}

// A good event does not become a dead letter, however many restarts interrupt it.
func TestRestartsAreNoFailures(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("e", 3)...)
	cfg := config()
	cfg.Tries = newTries()
	cfg.DrainTimeout = time.Millisecond
	for i := range 14 {
		r := newRecorder()
		begun := make(chan struct{}, 3)
		r.handle = func(ctx context.Context, _ schema.Event, _ schema.Delivery) error {
			begun <- struct{}{}
			<-ctx.Done()
			return context.Cause(ctx)
		}
		w := run(t, js, cfg, r)
		for range 3 {
			<-begun
		}
		if err := w.wait(); err != nil {
			t.Fatal(err)
		}
		if _, deadLetters := r.count(); deadLetters > 0 {
			t.Fatalf("%d dead letters after %d restarts", deadLetters, i+1)
		}
	}
	r := newRecorder()
	cfg.DrainTimeout = 0
	run(t, js, cfg, r)
	settled(t, stream)
	if done, deadLetters := r.count(); done != 3 || deadLetters != 0 {
		t.Errorf("%d events were handled and %d became dead letters, want 3 and 0", done, deadLetters)
	}
	for _, id := range ids("e", 3) {
		if d := r.deliveries(id); len(d) != 1 || d[0].Delivered != 15 {
			t.Errorf("%s was delivered as %+v", id, d)
		}
	}
}

// Failures count over restarts. The last of MaxDeliver makes the message a dead letter.
func TestFailuresAreCountedOverRestarts(t *testing.T) {
	js := natstest.Start(t).JetStream()
	ensure(t, js)
	publish(t, js, "fails")
	cfg := config()
	cfg.Tries = newTries()
	r := newRecorder()
	failures := 0
	r.handle = func(context.Context, schema.Event, schema.Delivery) error { return errors.New("the session was lost") }
	for r.deadLetter(1) == nil {
		w := run(t, js, cfg, r)
		before := failures
		natstest.Until(t, "an attempt has failed",
			func() bool { failures = len(r.deliveries("fails")); return failures > before })
		if err := w.wait(); err != nil {
			t.Fatal(err)
		}
	}
	if l := r.deadLetter(1); failures != 5 || l.Kind != schema.KindFailed {
		t.Errorf("a dead letter of kind %s after %d failures, want %s after 5", l.Kind, failures, schema.KindFailed)
	}
}

// takeAndSay pulls n messages from the model's consumer as a worker does, and answers each with the given text.
func takeAndSay(t testing.TB, nc *nats.Conn, n int, word string) {
	t.Helper()
	arrived := make(chan *nats.Msg, n+64)
	sub, err := nc.ChanSubscribe(nc.NewInbox(), arrived)
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	if err := nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT.GENERATION."+consumers.Durable(model), sub.Subject,
		fmt.Appendf(nil, `{"batch":%d}`, n)); err != nil {
		t.Fatal(err)
	}
	timeout := time.After(time.Minute)
	for range n {
		select {
		case msg := <-arrived:
			if err := nc.Publish(msg.Reply, []byte(word)); err != nil {
				t.Fatal(err)
			}
		case <-timeout:
			t.Fatal("the messages did not come")
		}
	}
}

// Innocent events do not become dead letters although sixteen of their workers were killed. They are handled, a few at
// a time.
func TestKillsAreNoFailures(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	cfg := config()
	cfg.Tries = newTries()
	w := run(t, js, cfg, newRecorder())
	natstest.Until(t, "the consumer is there", func() bool {
		_, err := stream.Consumer(t.Context(), consumers.Durable(model))
		return err == nil
	})
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
	publish(t, js, ids("e", 60)...)
	nc := s.Connect()
	for range 16 { // for the server, silence for AckWait comes to the same
		takeAndSay(t, nc, 60, "-NAK")
	}
	r := newRecorder()
	var now, most atomic.Int64
	r.handle = func(context.Context, schema.Event, schema.Delivery) error {
		n := now.Add(1)
		defer now.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		return nil
	}
	run(t, js, cfg, r)
	settled(t, stream)
	if done, deadLetters := r.count(); done != 60 || deadLetters != 0 {
		t.Errorf("%d events were handled and %d became dead letters, want 60 and 0", done, deadLetters)
	}
	if most.Load() > 16 {
		t.Errorf("%d suspects were handled at once", most.Load())
	}
}

// An event whose workers ended while they handled it among few others is handled alone: nothing else is handled, of any
// model. After three more workers have ended with it, it is a dead letter.
func TestSuspectsAreHandledAlone(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	cfg := config()
	tries := newTries()
	cfg.Tries = tries
	publish(t, js, append([]string{"suspect", "guilty"}, ids("e", 40)...)...)
	for sequence, sum := range map[uint64]schema.Tries{1: {Watched: 1}, 2: {Alone: 3}} {
		tries.sums[sequence] = sum
	}
	first := newRecorder()
	first.handle = func(ctx context.Context, _ schema.Event, _ schema.Delivery) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	cfg.DrainTimeout = time.Millisecond
	for range 2 { // the next delivery is the third
		w := run(t, js, cfg, first)
		n := len(first.deliveries("suspect"))
		natstest.Until(t, "the suspect is in flight",
			func() bool { return len(first.deliveries("suspect")) > n && len(first.deliveries("guilty")) > n })
		if err := w.wait(); err != nil {
			t.Fatal(err)
		}
	}
	cfg.DrainTimeout = 0
	r := newRecorder()
	var now, beside atomic.Int64
	r.handle = func(_ context.Context, ev schema.Event, _ schema.Delivery) error {
		n := now.Add(1)
		defer now.Add(-1)
		if ev.ID == "suspect" {
			beside.Store(n - 1)
		}
		return nil
	}
	run(t, js, cfg, r)
	settled(t, stream)
	if done, deadLetters := r.count(); done != 41 || deadLetters != 1 || beside.Load() != 0 {
		t.Errorf("%d events were handled, %d became dead letters, %d were handled beside the suspect; want 41, 1, 0", done,
			deadLetters, beside.Load())
	}
	if l := r.deadLetter(2); l == nil || l.Kind != schema.KindGivenUp || l.Event == nil || l.Event.ID != "guilty" {
		t.Errorf("dead letter is %+v", l)
	}
}

// A worker whose handler does not return keeps its messages for the handle timeout. Then a healthy worker gets them.
func TestHungHandlerGivesMessagesAway(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("e", 30)...)
	cfg := config()
	cfg.MaxInFlight = 15
	cfg.HandleTimeout, cfg.AckWait = 300*time.Millisecond, 600*time.Millisecond
	shared := newTries()
	cfg.Tries = shared

	hang := make(chan struct{})
	hung := newRecorder()
	hung.handle = func(context.Context, schema.Event, schema.Delivery) error { <-hang; return errors.New("late") }
	hungConfig := cfg
	var probes atomic.Int64
	hungConfig.Healthy = func(context.Context) error { probes.Add(1); return errors.New("the device does not answer") }
	reg := prometheus.NewRegistry()
	hungConfig.Metrics = consumers.NewMetrics(reg, cfg.Models)
	w := run(t, js, hungConfig, hung)
	release := sync.OnceFunc(func() { close(hang) })
	t.Cleanup(release) // before the worker is waited for
	natstest.Until(t, "the worker hangs with messages", func() bool {
		hung.mu.Lock()
		defer hung.mu.Unlock()
		return len(hung.handled) == 15
	})
	healthy := newRecorder()
	run(t, s.JetStream(), cfg, healthy)
	settled(t, stream)
	if done, deadLetters := healthy.count(); done != 30 || deadLetters != 0 {
		t.Errorf("the healthy worker handled %d events and wrote %d dead letters, want 30 and 0", done, deadLetters)
	}
	natstest.Until(t, "the hung worker has asked for health", func() bool { return probes.Load() > 0 })
	hung.mu.Lock()
	if len(hung.handled) != 15 {
		t.Errorf("the hung worker took %d messages", len(hung.handled))
	}
	hung.mu.Unlock()
	release()
	if err := w.wait(); err != nil {
		t.Error(err)
	}
	// Late acknowledgements have no effect and do not count.
	for sequence, sum := range shared.sums {
		if sum.Failed > 0 {
			t.Errorf("message %d has %d failures", sequence, sum.Failed)
		}
	}
}

// An advisory whose message cannot be settled is tried again at growing intervals.
func TestAdvisoriesBackOff(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	cfg := config()
	r := newRecorder()
	refused := errors.New("the row is refused")
	r.refuse.Store(&refused)
	delays := make(chan time.Duration, 1000)
	if _, err := s.Connect().Subscribe("$JS.ACK.GENERATION_ADVISORIES.>", func(m *nats.Msg) {
		if delay, ok := strings.CutPrefix(string(m.Data), `-NAK {"delay": `); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(delay, "}"), 10, 64)
			if err != nil {
				t.Error(err)
			}
			delays <- time.Duration(n)
		}
	}); err != nil {
		t.Fatal(err)
	}
	run(t, js, cfg, r)
	natstest.Until(t, "the advisories are stored", func() bool {
		_, err := js.Consumer(t.Context(), consumers.AdvisoryStream("GENERATION"), "terminated-decuwatch")
		return err == nil
	})
	// Nobody pulls from this consumer, so the message is terminated and has no dead letter.
	if _, err := stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{
		Durable: consumers.Durable("elsewhere"), FilterSubject: schema.SubjectGeneration("elsewhere"),
		AckPolicy: jetstream.AckExplicitPolicy,
	}); err != nil {
		t.Fatal(err)
	}
	seq := s.PublishRaw(t, schema.SubjectGeneration("elsewhere"), "NATS/1.0\r\nno colon\r\n\r\n", nil)
	c, err := stream.Consumer(t.Context(), consumers.Durable("elsewhere"))
	if err != nil {
		t.Fatal(err)
	}
	msg, err := c.Next(jetstream.FetchMaxWait(30 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if err := msg.Term(); err != nil {
		t.Fatal(err)
	}
	for i, want := range []time.Duration{10, 20, 40, 50, 50} {
		select {
		case got := <-delays:
			if got != want*time.Millisecond {
				t.Errorf("the delay after try %d is %s, want %s", i+1, got, want*time.Millisecond)
			}
		case <-time.After(time.Minute):
			t.Fatal("the advisory is not tried again")
		}
	}
	r.refuse.Store(nil)
	natstest.Until(t, "the message has its dead letter", func() bool { return r.deadLetter(seq) != nil })
}

// The event's time is compared with the time when the stream stored the message, not with the worker's clock.
func TestEventTimeIsHeldAgainstTheStream(t *testing.T) {
	for _, c := range []struct {
		name   string
		stored time.Duration // by the worker's clock
		event  time.Duration // after it was stored
		valid  bool
	}{
		{"a worker whose clock is 25 hours slow", 25 * time.Hour, 0, true},
		{"a worker whose clock is 25 hours fast", -25 * time.Hour, 0, true},
		{"an event just within the bound", 25 * time.Hour, 24 * time.Hour, true},
		{"an event beyond the bound", -48 * time.Hour, 24*time.Hour + time.Second, false},
		{"an event beyond the bound, on time", 0, 25 * time.Hour, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			stored := time.Now().Add(c.stored).UTC().Truncate(time.Microsecond)
			// Publish would compare the time with this machine's clock.
			body := strings.Replace(string(payload(t, "one", model)), "2026-05-04T03:02:01Z",
				stored.Add(c.event).Format(time.RFC3339Nano), 1)
			m := consumers.Stored{Subject: schema.SubjectGeneration(model), Sequence: 1, Time: stored, Payload: []byte(body)}
			_, err := m.Decode()
			var invalid *schema.Invalid
			if c.valid != (err == nil) || err != nil && (!errors.As(err, &invalid) || invalid.Field != "time") {
				t.Errorf("decoded with %v", err)
			}
		})
	}
}

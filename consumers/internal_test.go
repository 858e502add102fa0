package consumers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// permanent is an error after which retrying will not help.
type permanent struct {
	error
	kind schema.DeadLetterKind
}

func (p permanent) Unwrap() error                         { return p.error }
func (p permanent) DeadLetterKind() schema.DeadLetterKind { return p.kind }

func TestDecide(t *testing.T) {
	c := Config{Models: []string{"m"}, MaxDeliver: 4, RetryDelay: time.Second, RetryMaxDelay: 3 * time.Second}
	plain := errors.New("session lost")
	invalid := fmt.Errorf("score: %w", &schema.Invalid{Field: "data.class", Reason: "must be below 10"})
	for _, x := range []struct {
		name      string
		err       error
		delivered int
		draining  bool
		want      decision
	}{
		{"committed", nil, 1, false, decision{action: acknowledge}},
		{"committed while draining", nil, 4, true, decision{action: acknowledge}},
		{"invalid", invalid, 1, false, decision{action: deadLetter, kind: schema.KindInvalid, field: "data.class",
			reason: "must be below 10"}},
		{"invalid while draining", invalid, 1, true, decision{action: deadLetter, kind: schema.KindInvalid,
			field: "data.class", reason: "must be below 10"}},
		{"permanent", fmt.Errorf("a: %w", permanent{plain, schema.KindUnknownClass}), 1, false,
			decision{action: deadLetter, kind: "unknown_class", reason: "a: session lost"}},
		{"invalid with a kind", permanent{invalid, schema.KindDuplicateID}, 1, false,
			decision{action: deadLetter, kind: "duplicate_id", field: "data.class", reason: "must be below 10"}},
		{"first failure", plain, 1, false, decision{action: redeliver, reason: "session lost", delay: time.Second}},
		{"second failure", plain, 2, false, decision{action: redeliver, reason: "session lost", delay: 2 * time.Second}},
		{"third failure", plain, 3, false, decision{action: redeliver, reason: "session lost", delay: 3 * time.Second}},
		{"last failure", plain, 4, false, decision{action: deadLetter, kind: schema.KindFailed, reason: "session lost"}},
		{"failure while draining", plain, 4, true, decision{action: release, reason: "session lost"}},
	} {
		if got := c.decide(x.err, x.delivered, x.draining); got != x.want {
			t.Errorf("%s: %+v, want %+v", x.name, got, x.want)
		}
	}
	if d := c.retryDelay(1 << 20); d != c.RetryMaxDelay {
		t.Errorf("after many deliveries the delay is %s", d)
	}
}

func TestClean(t *testing.T) {
	if got := clean("a\nb\x00c\xff"); got != "a b c?" {
		t.Errorf("got %q", got)
	}
	if got := clean(" \n"); got == "" || got != clean("") {
		t.Errorf("got %q", got)
	}
	long := clean(strings.Repeat("é", 3000))
	if len(long) > maxReason || !utf8.ValidString(long) {
		t.Errorf("%d bytes, valid UTF-8: %v", len(long), utf8.ValidString(long))
	}
}

func FuzzClean(f *testing.F) {
	f.Add("steps: 1e9\n")
	f.Add("\xf0\x90")
	f.Fuzz(func(t *testing.T, s string) {
		if got := clean(s); len(got) > maxReason || !utf8.ValidString(got) || strings.ContainsAny(got, "\x00\r\n") {
			t.Errorf("clean(%q) = %q", s, got)
		}
	})
}

func TestSlots(t *testing.T) {
	s := newSlots(10)
	take := func(n, want int) {
		t.Helper()
		got, err := s.take(t.Context(), n)
		if err != nil || got != want {
			t.Errorf("took %d of %d, %v; want %d", got, n, err, want)
		}
	}
	take(4, 4)
	take(64, 6)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if n, err := s.take(ctx, 1); err == nil {
		t.Errorf("took %d of none", n)
	}
	s.give(3)
	take(8, 3)
	s.give(10)
	s.wait()
}

// The gate checks health at growing intervals while a dependency is away, and opens when it is back.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		var asked atomic.Int64
		healthy := func(context.Context) error {
			asked.Add(1)
			if away.Load() {
				return errors.New("connection refused")
			}
			return nil
		}
		g := newGate(t.Context(), healthy, slog.New(slog.DiscardHandler), NewMetrics(nil, nil))
		defer g.stop()
		if !g.check(t.Context()) || g.wait(t.Context()) != nil {
			t.Error("a healthy gate is shut")
		}
		away.Store(true)
		if g.check(t.Context()) {
			t.Error("an unwell gate is open")
		}
		asked.Store(0)
		time.Sleep(time.Minute) // of the bubble's clock
		if n := asked.Load(); n < 15 || n > 50 {
			t.Errorf("asked %d times in a minute", n)
		}
		if g.check(t.Context()) {
			t.Error("the gate opened by itself")
		}
		waited := make(chan error, 1)
		go func() { waited <- g.wait(t.Context()) }()
		away.Store(false)
		if err := <-waited; err != nil {
			t.Error(err)
		}
		if !g.check(t.Context()) {
			t.Error("the gate is shut although all is well")
		}
	})
}

// A gate that is tripped again and again stays shut for longer, even if the health check succeeds.
func TestGateTrips(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t.Context(), func(context.Context) error { return nil }, slog.New(slog.DiscardHandler),
			NewMetrics(nil, nil))
		defer g.stop()
		shut := func() time.Duration {
			start := time.Now()
			g.trip(errors.New("locked"))
			g.trip(errors.New("locked")) // of another message in flight
			if g.check(t.Context()) {
				t.Error("the gate is open after a trip")
			}
			if err := g.wait(t.Context()); err != nil {
				t.Error(err)
			}
			return time.Since(start)
		}
		first := shut()
		var last time.Duration
		for range 8 {
			last = shut()
		}
		if first > probeLeast || last < probeMost/2 || last > probeMost {
			t.Errorf("shut for %s at first, %s at last", first, last)
		}
		g.success()
		if again := shut(); again > probeLeast {
			t.Errorf("shut for %s after a success", again)
		}
	})
}

// A stop ends the wait for a dependency.
func TestGateStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		g := newGate(ctx, func(context.Context) error { return errors.New("away") }, slog.New(slog.DiscardHandler),
			NewMetrics(nil, nil))
		g.check(ctx)
		cancel(errDrained)
		if err := g.wait(ctx); !errors.Is(err, errDrained) {
			t.Errorf("wait returned %v", err)
		}
		g.stop()
	})
}

// beaten counts the heartbeats that it gets.
type beaten struct {
	times []time.Duration
	start time.Time
}

func (b *beaten) progress() error {
	b.times = append(b.times, time.Since(b.start))
	return nil
}

// A message in flight gets its heartbeats an interval apart, or at most 1.5 intervals, and none after they were
// stopped.
func TestHeartbeatTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHeartbeats(10*time.Second, slog.New(slog.DiscardHandler))
		time.Sleep(3 * time.Second)
		msg := &beaten{start: time.Now()}
		beat := h.start(msg)
		time.Sleep(time.Minute)
		beat.stop()
		beat.stop()
		n := len(msg.times)
		last := time.Duration(0)
		for _, at := range msg.times {
			if gap := at - last; gap < 10*time.Second || gap > 15*time.Second {
				t.Errorf("heartbeats at %v", msg.times)
				break
			}
			last = at
		}
		if n < 4 {
			t.Errorf("%d heartbeats in a minute", n)
		}
		time.Sleep(time.Minute)
		if len(msg.times) != n {
			t.Error("heartbeats went on after the stop")
		}
		h.stop()
	})
}

// The counts of attempts decide whether a message is isolated. Failures and stops never isolate it.
func TestIsolationOf(t *testing.T) {
	for _, x := range []struct {
		name      string
		delivered int
		sum       schema.Tries
		want      isolation
		givenUp   bool
	}{
		{"first delivery", 1, schema.Tries{}, ordinary, false},
		{"one silent end", 2, schema.Tries{}, ordinary, false},
		{"two silent ends", 3, schema.Tries{}, watched, false},
		{"many silent ends", 1000, schema.Tries{}, watched, false},
		{"failures", 5, schema.Tries{Failed: 4}, ordinary, false},
		{"stops", 15, schema.Tries{HandedBack: 14}, ordinary, false},
		{"stops and failures", 19, schema.Tries{HandedBack: 14, Failed: 4}, ordinary, false},
		{"stops, and two silent ends", 17, schema.Tries{HandedBack: 14}, watched, false},
		{"a consumer that was created again", 3, schema.Tries{HandedBack: 14}, ordinary, false},
		{"ended while watched", 4, schema.Tries{Watched: 1}, alone, false},
		{"ended alone", 5, schema.Tries{Watched: 1, Alone: 2}, alone, false},
		{"ended alone three times", 6, schema.Tries{Watched: 1, Alone: 3}, alone, true},
	} {
		got, err := isolationOf(x.delivered, x.sum)
		var kinded interface{ DeadLetterKind() schema.DeadLetterKind }
		if got != x.want || errors.As(err, &kinded) != x.givenUp {
			t.Errorf("%s: isolation %d, %v; want %d, given up: %t", x.name, got, err, x.want, x.givenUp)
		}
	}
	for _, x := range []struct {
		level     isolation
		cost, all int
		want      int64
	}{
		{ordinary, 0, 10, 1}, {ordinary, 7, 10, 7}, {ordinary, 70, 10, 10}, {watched, 1, 160, 10}, {watched, 30, 160, 30},
		{watched, 1, 3, 1}, {alone, 1, 160, 160},
	} {
		if got := x.level.rows(x.cost, x.all); got != x.want {
			t.Errorf("isolation %d: %d of %d rows for a cost of %d, want %d", x.level, got, x.all, x.cost, x.want)
		}
	}
}

func TestParseAck(t *testing.T) {
	for _, reply := range []string{
		"$JS.ACK.GENERATION.decuwatch-m.3.41.57.1700000000123456789.9",
		"$JS.ACK._.ACCHASH.GENERATION.decuwatch-m.3.41.57.1700000000123456789.9",
		"$JS.ACK.hub.ACCHASH.GENERATION.decuwatch-m.3.41.57.1700000000123456789.9.token",
	} {
		m, err := parseAck(reply)
		if err != nil || m.stream != "GENERATION" || m.delivered != 3 || m.Sequence != 41 ||
			m.Time.UnixNano() != 1700000000123456789 {
			t.Errorf("%s: %+v, %v", reply, m, err)
		}
	}
	for _, reply := range []string{"$JS.ACK.", "$JS.ACK.a.b.c.d.e.f", "$JS.ACK.G.d.x.41.57.1.9",
		"$JS.ACK.G.d.1.-1.57.1.9", "$JS.ACK.G.d.1.1.57.x.9", "$JS.ACK.a.G.d.1.1.57.1.9"} {
		if m, err := parseAck(reply); err == nil {
			t.Errorf("%s: %+v", reply, m)
		}
	}
}

// After a look that failed because an answer was lost, the next one comes soon. After a slow look it does not.
func TestUntilNextLook(t *testing.T) {
	for _, x := range []struct {
		took   time.Duration
		looked bool
		want   time.Duration
	}{
		{time.Millisecond, true, 5 * time.Second}, {2 * time.Second, true, 20 * time.Second},
		{15 * time.Second, true, 30 * time.Second}, {30 * time.Second, false, 5 * time.Second},
	} {
		if got := untilNextLook(5*time.Second, x.took, x.looked); got != x.want {
			t.Errorf("after %s, looked %t: %s, want %s", x.took, x.looked, got, x.want)
		}
	}
}

// A request that gets no answer is sent again, for a limited time. A refusal is an answer.
func TestAgain(t *testing.T) {
	refused := &jetstream.APIError{Code: 404, Description: "no message found"}
	busy := &jetstream.APIError{Code: 503, Description: "no leader"}
	for name, x := range map[string]struct {
		answers []error // nil is a success, errSilent no answer
		tries   int
		atMost  time.Duration
		want    error
	}{
		"well":           {[]error{nil}, 1, 0, nil},
		"lost once":      {[]error{errSilent, nil}, 2, askTimeout + time.Second, nil},
		"without leader": {[]error{busy, busy, nil}, 3, 3 * time.Second, nil},
		"an election":    {append(slices.Repeat([]error{busy}, 10), nil), 11, 10 * time.Second, nil},
		"refused":        {[]error{refused}, 1, 0, refused},
		"no such stream": {[]error{jetstream.ErrStreamNotFound}, 1, 0, jetstream.ErrStreamNotFound},
		"never an answer": {[]error{errSilent, errSilent, errSilent, errSilent}, 4, askFor + askTimeout,
			context.DeadlineExceeded},
	} {
		synctest.Test(t, func(t *testing.T) {
			start, tries := time.Now(), 0
			err := withRetry(t.Context(), func(ctx context.Context) error {
				answer := x.answers[tries]
				tries++
				if answer == errSilent { //nolint:errorlint // a marker
					<-ctx.Done()
					return ctx.Err()
				}
				return answer
			})
			if took := time.Since(start); !errors.Is(err, x.want) || tries != x.tries || took > x.atMost {
				t.Errorf("%s: %v after %d tries and %s, want %v after %d and at most %s", name, err, tries, took, x.want, x.tries,
					x.atMost)
			}
		})
	}
}

var errSilent = errors.New("no answer")

// TestOrphansAfterAnOutageOfEverything starts a worker when the server was restarted, or when workers of another model
// were down for longer than the grace period. The other workers get their events if they start while this worker still
// watches.
func TestOrphansAfterAnOutageOfEverything(t *testing.T) {
	start := time.Date(2026, 1, 10, 12, 0, 0, 0, time.UTC)
	long := start.Add(-30 * time.Hour)
	const grace = 24 * time.Hour
	subject := schema.SubjectGeneration("other")
	for _, c := range []struct {
		name   string
		used   *time.Time // what the server remembers
		buried time.Duration
	}{
		{"the workers were down", &long, orphanWatch},
		{"the server was restarted, or has a new leader", nil, grace},
	} {
		o := newOwners([]string{"mine"}, time.Minute)
		v := func(after time.Duration) *View {
			return &View{Time: start.Add(after), State: jetstream.StreamState{Subjects: map[string]uint64{subject: 1}},
				Consumers: map[string]jetstream.ConsumerInfo{
					Durable("other"): {
						Created: start.Add(-720 * time.Hour), TimeStamp: start.Add(after),
						Delivered: jetstream.SequenceInfo{Last: c.used},
						Config:    jetstream.ConsumerConfig{Durable: Durable("other"), FilterSubject: subject},
					},
				}}
		}
		o.of(v(0), subject)
		for _, after := range []time.Duration{time.Second, c.buried - time.Second, c.buried} {
			at := v(after)
			if due := o.of(at, subject).due(at.Time, grace); due != (after == c.buried) {
				t.Errorf("%s: after %s its events become dead letters: %t", c.name, after, due)
			}
		}
	}
}

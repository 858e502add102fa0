package alerts_test

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
)

// TestRelaySimulation runs relays against an outbox and sinks in memory, in virtual time, with faults that a seed
// draws: refusals, lost answers of the database and of the sinks, hanging sinks, relays that are stopped or killed.
// DECUWATCH_SIM_SEEDS=10000 runs more of them; DECUWATCH_SIM_SEED=17 one again.
func TestRelaySimulation(t *testing.T) {
	first, n := number(t, "DECUWATCH_SIM_SEED", 1), number(t, "DECUWATCH_SIM_SEEDS", 100)
	if first != 1 && os.Getenv("DECUWATCH_SIM_SEEDS") == "" {
		n = 1
	}
	for seed := first; seed < first+n; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { simulateRelays(t, seed) })
		})
	}
}

func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text, set := os.LookupEnv(name)
	if !set {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

const (
	simAlerts = 80
	simFaults = 3 * time.Minute // how long there are faults
	simDrain  = 2 * time.Hour   // how long everything may take to drain after: a Retry-After counts for an hour
)

// simWorld is an outbox and what a seed does to it.
type simWorld struct {
	t    *testing.T
	seed uint64
	born time.Time
	cfg  alerts.RelayConfig

	mu   sync.Mutex
	rows []*simRow
}

// simRow is what is owed to one sink.
type simRow struct {
	message schema.OutboxMessage
	due     time.Time
	owner   *simRelay // that has leased it, until due
	taken   int       // how often the sink took it
	sent    bool      // the outbox knows
}

func (w *simWorld) draw(about ...any) *rand.Rand {
	h := fnv.New64a()
	_, _ = fmt.Fprint(h, about...) // a hash takes everything
	return rand.New(rand.NewPCG(w.seed, h.Sum64()))
}

func (w *simWorld) faulty(percent int, about ...any) bool {
	return time.Since(w.born) < simFaults && w.draw(about...).IntN(100) < percent
}

// simRelay is one process with its view of the outbox.
type simRelay struct {
	*simWorld
	name  string
	stop  context.CancelFunc
	ended chan struct{}

	life sync.Mutex
	gone bool
}

func (r *simRelay) alive() bool {
	r.life.Lock()
	defer r.life.Unlock()
	return !r.gone
}

var errSimulated = errors.New("the connection was lost")

// call is a statement: it takes a moment, may fail before it has an effect, and its answer may be lost.
func (r *simRelay) call(ctx context.Context, what string, effect func()) error {
	at := time.Since(r.born)
	took := time.Duration(r.draw(r.name, what, "took", at).Int64N(int64(300 * time.Millisecond)))
	select {
	case <-time.After(took):
	case <-ctx.Done():
		if r.alive() && r.draw(r.name, what, "canceled", at).IntN(2) == 0 { // it arrived before it was canceled
			effect()
		}
		return ctx.Err()
	}
	if !r.alive() || r.faulty(10, r.name, what, "before", at) {
		return errSimulated
	}
	effect()
	if r.faulty(10, r.name, what, "after", at) {
		return errSimulated
	}
	return nil
}

func (r *simRelay) OutboxNext(
	ctx context.Context, sink schema.Sink, limit int, lease time.Duration,
) ([]schema.OutboxMessage, error) {
	var batch []schema.OutboxMessage
	err := r.call(ctx, "next "+string(sink), func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, row := range r.rows {
			if row.message.Sink == sink && !row.sent && len(batch) < limit && !time.Now().Before(row.due) {
				row.due, row.owner = time.Now().Add(lease), r
				batch = append(batch, row.message)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	return batch, nil
}

func (r *simRelay) OutboxDelivered(ctx context.Context, ids []int64) error {
	return r.call(ctx, fmt.Sprint("delivered ", ids), func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, id := range ids {
			row := r.rows[id]
			if row.taken == 0 {
				r.t.Errorf("message %d is recorded as delivered, and no sink took it", id)
			}
			row.sent, row.owner = true, nil
		}
	})
}

func (r *simRelay) OutboxFailed(ctx context.Context, id int64, reason string, wait time.Duration) error {
	if wait < r.cfg.RetryDelay || wait > time.Hour {
		r.t.Errorf("message %d is tried again after %s", id, wait)
	}
	if reason == "" {
		r.t.Errorf("message %d failed for no reason", id)
	}
	return r.call(ctx, fmt.Sprint("failed ", id), func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		row := r.rows[id]
		if row.message.Attempts > 0 && wait < r.cfg.RetryMax && wait < r.cfg.RetryDelay<<min(row.message.Attempts, 20) {
			r.t.Errorf("message %d failed %d times before, and is tried again after %s", id, row.message.Attempts, wait)
		}
		row.message.Attempts++
		row.due, row.owner = time.Now().Add(wait), nil
	})
}

func (r *simRelay) OutboxStats(context.Context) ([]schema.OutboxStats, error) { return nil, nil }
func (r *simRelay) SilenceCounts(context.Context) (map[string]int, error)     { return nil, nil }

// Listen hears of new messages now and then, and misses some.
func (r *simRelay) Listen(ctx context.Context, _ string, changed func()) error {
	for {
		select {
		case <-time.After(time.Duration(r.draw(r.name, "listen", time.Since(r.born)).Int64N(int64(10 * time.Second)))):
			if !r.faulty(20, r.name, "listening", time.Since(r.born)) {
				changed()
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// simSink is a sink as one relay sees it.
type simSink struct {
	*simRelay
	sink schema.Sink
}

func (s simSink) Name() schema.Sink { return s.sink }

// later asks for the next attempt after a time.
type later struct{ time.Duration }

func (l later) Error() string             { return "503 Service Unavailable" }
func (l later) RetryAfter() time.Duration { return l.Duration }

func (s simSink) Send(ctx context.Context, m schema.OutboxMessage) error {
	at := time.Since(s.born)
	s.mu.Lock()
	row := s.rows[m.ID]
	if s.alive() && row.owner != s.simRelay {
		s.t.Errorf("message %d is sent by a relay that has no lease of it", m.ID)
	}
	s.mu.Unlock()
	d := s.draw(s.sink, m.ID, at)
	if s.faulty(5, s.sink, m.ID, "hangs", at) {
		<-ctx.Done()
		return ctx.Err()
	}
	select {
	case <-time.After(time.Duration(d.Int64N(int64(time.Second)))):
	case <-ctx.Done():
		return ctx.Err()
	}
	switch draw := d.IntN(100); {
	case time.Since(s.born) >= simFaults || draw >= 40:
		s.take(row)
		return nil
	case draw < 10: // the answer is lost
		s.take(row)
		return errSimulated
	case draw < 15:
		most := 2 * time.Minute
		if draw == 10 {
			most = 3 * time.Hour // an hour is what counts
		}
		return later{time.Duration(d.Int64N(int64(most)))}
	default:
		return errors.New("500 Internal Server Error")
	}
}

func (s simSink) take(row *simRow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.alive() {
		row.taken++
	}
}

func (w *simWorld) start(name string) *simRelay {
	r := &simRelay{simWorld: w, name: name, ended: make(chan struct{})}
	relay, err := alerts.NewRelay(r, w.cfg, simSink{r, "stream"}, simSink{r, "webhook"})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() {
		defer close(r.ended)
		if err := relay.Run(ctx); err != nil {
			w.t.Errorf("%s: %v", name, err)
		}
	}()
	return r
}

// kill ends the relay as SIGKILL does.
func (r *simRelay) kill() {
	r.life.Lock()
	r.gone = true
	r.life.Unlock()
	r.stop()
}

func simulateRelays(t *testing.T, seed uint64) {
	w := &simWorld{t: t, seed: seed, born: time.Now()}
	d := w.draw("config")
	w.cfg = alerts.RelayConfig{Batch: 1 + d.IntN(40), Concurrency: 1 + d.IntN(20), Logger: quiet}.WithDefaults()
	for i := range simAlerts {
		row := &simRow{due: w.born.Add(time.Duration(d.Int64N(int64(simFaults))))}
		sink := []schema.Sink{"stream", "webhook"}[d.IntN(2)]
		row.message = schema.OutboxMessage{ID: int64(i), Sink: sink, AlertID: strconv.Itoa(i)}
		w.rows = append(w.rows, row)
	}
	relays := []*simRelay{w.start("a"), w.start("b")}
	all := relays
	for i := 0; time.Since(w.born) < simFaults; i++ {
		d := w.draw("restart", i)
		time.Sleep(time.Duration(d.Int64N(int64(30 * time.Second))))
		n := d.IntN(2)
		if d.IntN(2) == 0 {
			relays[n].kill()
		} else {
			relays[n].stop()
		}
		relays[n] = w.start(fmt.Sprint("relay ", i))
		all = append(all, relays[n])
	}
	drained := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, row := range w.rows {
			if !row.sent {
				return false
			}
		}
		return true
	}
	for end := time.Now().Add(simDrain); !drained() && time.Now().Before(end); {
		time.Sleep(time.Second)
	}
	for _, r := range all {
		r.stop()
		<-r.ended
	}
	for _, row := range w.rows {
		if row.taken == 0 || !row.sent {
			t.Errorf("message %d: taken %d times by %s, recorded %t, after %d failed attempts",
				row.message.ID, row.taken, row.message.Sink, row.sent, row.message.Attempts)
		}
	}
}

// A relay that is stopped leaves no message leased: the next one need not wait for the end of the lease.
func TestRelayStopsWithoutLeases(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			w := &simWorld{t: t, seed: seed, born: time.Now().Add(-simFaults)} // no faults
			w.cfg = alerts.RelayConfig{Logger: quiet}.WithDefaults()
			for i := range 20 {
				w.rows = append(w.rows, &simRow{due: time.Now(), message: schema.OutboxMessage{ID: int64(i), Sink: "stream"}})
			}
			r := w.start("a")
			time.Sleep(time.Duration(w.draw("stop").Int64N(int64(600 * time.Millisecond))))
			r.stop()
			<-r.ended
			for _, row := range w.rows {
				if row.owner != nil && !row.sent {
					t.Fatalf("seed %d: message %d stays leased, taken %d times", seed, row.message.ID, row.taken)
				}
			}
		})
	}
}

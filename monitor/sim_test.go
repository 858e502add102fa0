package monitor_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// TestHandleSimulation delivers events several times at once to two monitors over one ledger in memory, in virtual
// time. A seed draws faults: lookups, runs and commits fail, take long, or lose their answer. A delivery that failed is
// repeated. DECUWATCH_SIM_SEEDS=10000 runs more seeds; DECUWATCH_SIM_SEED=17 runs one again.
func TestHandleSimulation(t *testing.T) {
	first, n := uint64(1), uint64(200)
	for name, v := range map[string]*uint64{"DECUWATCH_SIM_SEED": &first, "DECUWATCH_SIM_SEEDS": &n} {
		if text, set := os.LookupEnv(name); set {
			var err error
			if *v, err = strconv.ParseUint(text, 10, 64); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	for seed := first; seed < first+n; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { simulateHandle(t, seed) })
		})
	}
}

// simLedger is a ledger and a scorer whose faults a seed draws.
type simLedger struct {
	mu       sync.Mutex
	rng      *rand.Rand
	verdicts map[string]schema.Verdict
	losses   int // answers to commits that were lost
}

// fault waits, and fails in one of five calls.
func (l *simLedger) fault(ctx context.Context) error {
	l.mu.Lock()
	wait, fails := time.Duration(l.rng.Int64N(int64(2*time.Second))), l.rng.IntN(5) == 0
	l.mu.Unlock()
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if fails {
		return errors.New("the connection was lost")
	}
	return nil
}

func (l *simLedger) Recorded(ctx context.Context, ev schema.Event, d schema.Delivery) (bool, error) {
	if err := l.fault(ctx); err != nil {
		return false, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	v, known := l.verdicts[ev.ID]
	if known && v.Delivery.Digest != d.Digest {
		return false, &schema.Invalid{Field: "id", Reason: "belongs to another event"}
	}
	return known, nil
}

func (l *simLedger) Record(ctx context.Context, v schema.Verdict) (monitor.Recorded, error) {
	if err := l.fault(ctx); err != nil {
		return monitor.Recorded{}, err
	}
	l.mu.Lock()
	id := v.Score.Event.ID
	first, known := l.verdicts[id]
	if !known {
		l.verdicts[id] = v
	}
	lost := l.rng.IntN(4) == 0
	if lost {
		l.losses++
	}
	l.mu.Unlock()
	switch {
	case known && first.Delivery.Digest != v.Delivery.Digest:
		return monitor.Recorded{}, &schema.Invalid{Field: "id", Reason: "belongs to another event"}
	case lost:
		return monitor.Recorded{}, errors.New("the answer to the commit was lost")
	}
	return monitor.Recorded{First: !known}, nil
}

func (l *simLedger) Score(ctx context.Context, r scoring.Request) (scoring.Result, error) {
	if err := l.fault(ctx); err != nil {
		return scoring.Result{}, err
	}
	return result(r)
}

func (l *simLedger) Validate(scoring.Request) error { return nil }

func (l *simLedger) Rows(scoring.Request) int { return 7 }

func simulateHandle(t *testing.T, seed uint64) {
	ledger := &simLedger{rng: rand.New(rand.NewPCG(seed, 0)), verdicts: map[string]schema.Verdict{}}
	at, err := alerts.NewTable([]schema.Threshold{critical(schema.ClassGap, 0.1)})
	if err != nil {
		t.Fatal(err)
	}
	var monitors [2]*monitor.Monitor
	for i := range monitors {
		models := map[string]monitor.Model{"m": {Scorer: ledger, Classes: []string{"Trouser", "Bag"}, Profile: profile}}
		monitors[i], err = monitor.New(models, table{at}, ledger, monitor.Config{Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
	}
	const events, copies = 8, 3
	var delivering sync.WaitGroup
	var mu sync.Mutex
	refused := map[string]int{} // deliveries of another event with an id that is taken
	for i := range events {
		id := strconv.Itoa(i)
		for n := range copies {
			// The last copy of every other event is another event under the same id.
			digest := id
			if n == copies-1 && i%2 == 0 {
				digest += " other"
			}
			ev := schema.Event{Source: "//sim", ID: id, Data: schema.Generation{Model: "m", Class: schema.ClassIndex(i % 2)}}
			d := schema.Delivery{Stream: "S", Sequence: uint64(n), Digest: digest} //nolint:gosec // small
			delivering.Go(func() {
				for d.Delivered = 1; ; d.Delivered++ {
					ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
					err := handle(ctx, monitors[n%2], ev, d)
					cancel()
					var kinded interface{ DeadLetterKind() schema.DeadLetterKind }
					switch {
					case err == nil:
						mu.Lock()
						ledger.mu.Lock()
						v, known := ledger.verdicts[ev.ID]
						ledger.mu.Unlock()
						if !known || v.Delivery.Digest != digest {
							t.Errorf("event %s is done, and its verdict is %v of %q", ev.ID, known, v.Delivery.Digest)
						}
						mu.Unlock()
						return
					case errors.As(err, &kinded):
						mu.Lock()
						refused[ev.ID]++
						mu.Unlock()
						if kinded.DeadLetterKind() != schema.KindDuplicateID {
							t.Errorf("event %s: %v", ev.ID, err)
						}
						return
					case d.Delivered > 200:
						t.Errorf("event %s has no verdict after %d deliveries: %v", ev.ID, d.Delivered, err)
						return
					}
				}
			})
		}
	}
	delivering.Wait()
	for i := range events {
		id := strconv.Itoa(i)
		v, known := ledger.verdicts[id]
		if !known || v.Score == nil || len(v.Alerts) != 1 {
			t.Errorf("event %s: verdict %t with %d alerts, want a score with one", id, known, len(v.Alerts))
			continue
		}
		want := 0
		if i%2 == 0 { // one of the two events lost the race
			want = 1
			if v.Delivery.Digest != id {
				want = copies - 1
			}
		}
		if refused[id] != want {
			t.Errorf("event %s: %d deliveries were refused, want %d", id, refused[id], want)
		}
		if a := v.Alerts[0]; a.ID != alerts.ID("//sim", id, v.Score.Receipt.EnsembleDigest, schema.ClassGap) {
			t.Errorf("event %s: alert %s", id, a.ID)
		}
	}
}

package budget

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// parse reads budgets as a settings file has them.
func parse(t *testing.T, rules string) Config {
	t.Helper()
	c := Config{LeastShare: 0.01}
	if err := c.Rules.UnmarshalText([]byte(rules)); err != nil {
		t.Fatal(err)
	}
	return c
}

func open(t *testing.T, store Store, rules string, reg prometheus.Registerer) *Budgets {
	t.Helper()
	b, err := New(parse(t, rules), store, Options{Models: []string{"m", "n"}, MaxAge: 100 * time.Hour, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func first(stored time.Time) schema.Delivery { return schema.Delivery{Time: stored, Delivered: 1} }

// Bad budgets are refused, and the error names the entry and what is wrong.
func TestBadBudgetsAreRefused(t *testing.T) {
	for rules, want := range map[string]string{
		`[{rows-per-hour: 100}]`: "budget.rules: entry 1: policy is missing: with rows-per-hour or rows-per-day it must " +
			"be defer, sample or skip",
		`[{rows-per-day: 100, max-wait: 1m}]`:        "entry 1: policy is missing",
		`[{policy: skip}]`:                           "policy is skip without rows-per-hour or rows-per-day",
		`[{policy: drop, rows-per-day: 1}]`:          "policy is \"drop\", must be defer, sample or skip",
		`[{model: m}]`:                               "entry 1: it bounds nothing",
		`[{}]`:                                       "entry 1: it bounds nothing",
		`[{rows-per-hour: -1, policy: skip}]`:        "entry 1: rows are \"-1\", must be an integer of at least 1",
		`[{rows-per-hour: 1.5, policy: skip}]`:       "entry 1:",
		`[{rows-per-hour: lots, policy: skip}]`:      "entry 1:",
		`[{rows-per-hour: , policy: skip}]`:          "entry 1: rows-per-hour is empty",
		`[{max-wait: 5}]`:                            "entry 1:",
		`[{rows-per-hour: 0, policy: skip}]`:         "rows are \"0\"",
		`[{max-wait: 5ms}]`:                          "max-wait is 5ms, must be at least 1s",
		`[{max-wait: 1m, size: 4}]`:                  "field size not found",
		`[{model: "a b", max-wait: 1m}]`:             "model is \"a b\"",
		`[{max-wait: 1m}, {model: m, max-wait: 2m}]`: "entry 2 can never apply: entry 1 comes first",
		`[{model: m, max-wait: 1m}, {model: n, max-wait: 1m}, {model: m, max-wait: 2m}]`: "entry 3 can never apply",
	} {
		var c Config
		err := c.Rules.UnmarshalText([]byte(rules))
		if err == nil {
			c.LeastShare = 0.01
			err = c.Check()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", rules, err, want)
		}
	}
	for _, share := range []float64{-1, 0, 1.5, math.NaN()} {
		if err := (Config{LeastShare: share}).Check(); err == nil || !strings.Contains(err.Error(), "budget.least-share is") {
			t.Errorf("least share %g: %v", share, err)
		}
	}
}

// Workers that take rows at the same time take no more than one bucket holds, of the hour and of the day.
func TestReplicasShareOneBucket(t *testing.T) {
	store := pgtest.New(t)
	for _, c := range []struct {
		rules string
		size  float64
	}{
		{`[{model: m, rows-per-hour: 2000, policy: skip}]`, 2000},
		{`[{model: m, rows-per-hour: 5000, rows-per-day: 2000, policy: skip}]`, 2000},
	} {
		if _, err := store.BookRows(t.Context(), "m", postgres.Bucket{}, 0); err != nil { // an unbounded budget forgets
			t.Fatal(err)
		}
		start, rows := time.Now(), 7.0
		var taken atomic.Int64
		var workers sync.WaitGroup
		for range 3 {
			b := open(t, store, c.rules, nil)
			for range 4 {
				workers.Go(func() {
					for {
						ok, err := b.Take(t.Context(), "m", int(rows), first(start))
						if err != nil {
							t.Error(err)
						}
						if !ok {
							return
						}
						taken.Add(1)
					}
				})
			}
		}
		workers.Wait()
		spent := float64(taken.Load()) * rows
		refilled := time.Since(start).Seconds() * 5000 / 3600
		// A worker keeps less than what one of its events needs, or a hundredth of the bucket.
		if spent > c.size+refilled || spent < c.size-3*max(rows, c.size/100)-rows {
			t.Errorf("%s: %.0f rows were spent, the bucket holds %.0f and %.1f came in", c.rules, spent, c.size, refilled)
		}
		other := open(t, store, c.rules, nil)
		if ok, err := other.Take(t.Context(), "n", 1e6, first(start)); !ok || err != nil {
			t.Errorf("a model without a budget has no room: %v", err)
		}
	}
}

// What a worker has not used goes back when it stops, and what an event did not need serves the next.
func TestUnusedRowsGoBack(t *testing.T) {
	store := pgtest.New(t)
	const rules = `[{model: m, rows-per-hour: 1000, policy: skip}]`
	size := postgres.Bucket{Hour: 1000}
	b := open(t, store, rules, nil)
	if ok, err := b.Take(t.Context(), "m", 100, first(time.Now())); !ok || err != nil {
		t.Fatal(ok, err)
	}
	b.Give("m", 60)
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := b.Run(ctx); err != nil {
		t.Error(err)
	}
	p, err := store.BookRows(t.Context(), "m", size, 0)
	if err != nil || p.Missing.Hour > 40 || p.Missing.Hour < 30 { // less what came in since
		t.Errorf("%.1f rows are missing, 40 were used: %v", p.Missing.Hour, err)
	}
	// An event that costs more than a bucket takes a full one, so that it does not wait without end.
	big := open(t, store, `[{model: n, rows-per-hour: 50, policy: skip}]`, nil)
	for i, want := range []bool{true, false} {
		if ok, err := big.Take(t.Context(), "n", 80, first(time.Now())); ok != want || err != nil {
			t.Errorf("big event %d: %t, %v", i, ok, err)
		}
	}
}

// A deferred event waits until there is room. It is counted, and it does not outlive its message.
func TestDeferredEventsWait(t *testing.T) {
	store := pgtest.New(t)
	reg := prometheus.NewPedanticRegistry()
	const perSecond, rows = 40, 20
	b := open(t, store, fmt.Sprintf(`[{model: m, rows-per-hour: %d, policy: defer}]`, 3600*perSecond), reg)
	size := postgres.Bucket{Hour: 3600 * perSecond}
	if _, err := store.BookRows(t.Context(), "m", size, size.Hour+perSecond); err != nil { // a second's rows too many
		t.Fatal(err)
	}
	stored := time.Now()
	b.Observe("m", Backlog{Events: 7, Oldest: time.Hour, MaxAge: 100 * time.Hour})
	a := b.accounts["m"]
	results := make(chan error, 4)
	for range 4 {
		go func() {
			ok, err := b.Take(t.Context(), "m", rows, first(stored))
			if err == nil && !ok {
				err = errors.New("the event was skipped")
			}
			results <- err
		}()
	}
	until(t, "events are deferred", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.waiting == 4 })
	want := strings.NewReader(`
# HELP decuwatch_deferred_events Events that wait in the stream because the budget is used up.
# TYPE decuwatch_deferred_events gauge
decuwatch_deferred_events{model="m"} 7
decuwatch_deferred_events{model="n"} 0
`)
	if err := testutil.GatherAndCompare(reg, want, "decuwatch_deferred_events"); err != nil {
		t.Error(err)
	}
	a.mu.Lock()
	if age := a.expire(); age > 99*3600 || age < 98*3600 {
		t.Errorf("the oldest event expires in %.0f s", age)
	}
	a.mu.Unlock()
	// One whose message expires within the margin is skipped, although others wait before it.
	if ok, err := b.Take(t.Context(), "m", rows, first(time.Now().Add(-99*time.Hour))); ok || err != nil {
		t.Errorf("an event whose message expires: %t, %v", ok, err)
	}
	soon, err := b.Take(t.Context(), "m", rows, first(time.Now().Add(-99*time.Hour+50*time.Millisecond)))
	if soon || err != nil {
		t.Errorf("an event whose message expires soon: %t, %v", soon, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if ok, err := b.Take(ctx, "m", rows, first(time.Now())); ok || !errors.Is(err, context.Canceled) {
		t.Errorf("a stopped worker waits: %t, %v", ok, err)
	}
	for range 4 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if took := time.Since(stored).Seconds(); took < 1+3*rows/perSecond {
		t.Errorf("80 rows came after %.2f s, %d a second come in after the first second", took, perSecond)
	}
	if a.waiting != 0 {
		t.Errorf("%d events wait", a.waiting)
	}
}

// until polls a condition.
func until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// When events wait for too long, the share falls; when they no longer do, it is 1 again. Every worker sees it, each
// change is kept with its reason, and an event that was delivered before is drawn with the least share since it came.
func TestShareFollowsTheBacklog(t *testing.T) {
	store := pgtest.New(t)
	ctx := t.Context()
	const rules = `[{model: m, max-wait: 1m}]`
	reg := prometheus.NewPedanticRegistry()
	b, other := open(t, store, rules, reg), open(t, store, rules, nil)
	share := func(who *Budgets, d schema.Delivery) float64 {
		t.Helper()
		got, err := who.Share(ctx, "m", d)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	tick := func(who *Budgets, oldest time.Duration) {
		t.Helper()
		who.Observe("m", Backlog{Events: 100, Oldest: oldest, MaxAge: time.Hour})
		if err := who.tick(ctx, who.accounts["m"]); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	if got := share(b, first(now)); got != 1 {
		t.Fatalf("at first, the share is %g", got)
	}
	for _, c := range []struct {
		oldest time.Duration
		want   float64
	}{
		{time.Minute, 1}, {4 * time.Minute, 0.25}, {210 * time.Second, 0.25}, {2 * time.Minute, 0.5},
		{1000 * time.Minute, 0.01}, {59 * time.Second, 1}, {8 * time.Minute, 0.125}, {0, 1},
	} {
		tick(b, c.oldest)
		if got := share(b, first(now)); math.Abs(got-c.want) > 1e-12 {
			t.Errorf("the oldest event waits for %s: the share is %g, want %g", c.oldest, got, c.want)
		}
	}
	tick(b, 2*time.Minute)
	if got := share(other, first(now)); got != 0.5 {
		t.Errorf("another worker has the share %g", got)
	}
	if got := share(other, schema.Delivery{Time: now, Delivered: 2}); got != 0.01 {
		t.Errorf("an event that was delivered before has the share %g", got)
	}
	if got := share(other, schema.Delivery{Time: now.Add(time.Hour), Delivered: 2}); got != 0.5 {
		t.Errorf("an event that came after all changes has the share %g", got)
	}
	if err := testutil.GatherAndCompare(reg, strings.NewReader(`
# HELP decuwatch_sampling_share Share of the events selected by the rules that a budget or max-wait leaves to be scored.
# TYPE decuwatch_sampling_share gauge
decuwatch_sampling_share{model="m"} 0.5
decuwatch_sampling_share{model="n"} 1
`), "decuwatch_sampling_share"); err != nil {
		t.Error(err)
	}
	// Two workers that see the same make one change.
	tick(b, 16*time.Minute)
	tick(other, 16*time.Minute)
	if least, err := store.LeastShare(ctx, "m", time.Now().Add(time.Hour)); err != nil || least != 0.0625 {
		t.Errorf("in force is %g: %v", least, err)
	}
}

// The rows that are spent settle at what the bucket takes in, whatever comes, and the share is 1 again when less comes.
func TestSpendingSettlesAtTheBudget(t *testing.T) {
	for _, demand := range []float64{0.5, 1.5, 4, 30} { // in budgets
		const size = 1000.0 // rows an hour
		a := &account{Rule: Rule{RowsPerHour: size, Policy: Sample}, share: 1}
		spent, changes := 0.0, 0
		hours := func(n int, demand float64) (spentLast float64) {
			for second := range n * 3600 {
				rows := demand * size / 3600 * a.share
				a.missing.Hour = max(0, a.missing.Hour-size/3600) + rows
				share, _ := a.target(time.Time{}, 0.001)
				if share != a.share {
					changes++
				}
				a.share = share
				if spent += rows; second >= (n-1)*3600 {
					spentLast += rows
				}
			}
			return spentLast
		}
		last := hours(20, demand)
		if want := min(demand, 1) * size; math.Abs(last-want) > 0.15*want {
			t.Errorf("demand %g: %.0f rows in the last hour, want %.0f", demand, last, want)
		}
		if spent > 21*size {
			t.Errorf("demand %g: %.0f rows in 20 hours, the budget is %.0f and a bucket", demand, spent, 20*size)
		}
		if changes > 20*60 {
			t.Errorf("demand %g: the share changed %d times in 20 hours", demand, changes)
		}
		if hours(3, 0.5); a.share != 1 {
			t.Errorf("demand %g: the share is %g hours after the traffic fell", demand, a.share)
		}
	}
}

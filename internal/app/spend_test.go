package app

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor/reconcile"
	"github.com/decuwatch/decuwatch/monitor/sampling"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// spending is a running monitor, and what a test asks it.
type spending struct {
	t     *testing.T
	c     Config
	js    jetstream.JetStream
	conn  *pgx.Conn
	store *postgres.Store
	stop  func() // ends the monitor and waits
	log   *bytes.Buffer
	s     Serving
}

// spend starts nothing yet: the stream takes events first.
func spend(t *testing.T, c Config) *spending {
	t.Helper()
	x := &spending{t: t, c: c}
	var err error
	if x.js, err = jetstream.New(natstest.Connect(t, c.NATS.URL)); err != nil {
		t.Fatal(err)
	}
	if x.conn, err = pgx.Connect(t.Context(), c.Postgres.URL); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.conn.Close(context.Background()) })
	if x.store, err = postgres.Open(t.Context(), postgres.Config{URL: c.Postgres.URL}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.store.Close)
	return x
}

// serve runs the monitor until the test ends, or stop is called.
func (x *spending) serve() {
	x.t.Helper()
	ctx, cancel := context.WithCancel(x.t.Context())
	up, ended := make(chan Serving, 1), make(chan error, 1)
	x.log = &bytes.Buffer{}
	log := slog.New(slog.NewTextHandler(x.log, nil))
	go func() { ended <- Serve(ctx, x.c, Options{Log: log, Started: func(s Serving) { up <- s }}) }()
	select {
	case x.s = <-up:
	case err := <-ended:
		cancel()
		x.t.Fatal(err)
	}
	done := false
	x.stop = func() {
		if cancel(); !done {
			done = true
			if err := <-ended; err != nil {
				x.t.Error(err)
			}
		}
	}
	x.t.Cleanup(x.stop)
}

// publish publishes events with the ids prefix-0, prefix-1, ...
func (x *spending) publish(model, prefix string, class schema.Class, n int) {
	x.t.Helper()
	for i := range n {
		ev := schema.Event{Source: "//test", ID: fmt.Sprintf("%s-%d", prefix, i), Time: time.Now().UTC(),
			Data: schema.Generation{Model: model, Class: class, Seed: uint64(i), Labels: map[string]string{"tenant": prefix}}}
		_, payload, err := schema.Encode(ev)
		if err != nil {
			x.t.Fatal(err)
		}
		if _, err := x.js.Publish(x.t.Context(), schema.SubjectGeneration(model), payload); err != nil {
			x.t.Fatal(err)
		}
	}
}

// number returns what a query says.
func (x *spending) number(sql string, args ...any) float64 {
	x.t.Helper()
	var n float64
	if err := x.conn.QueryRow(x.t.Context(), sql, args...).Scan(&n); err != nil {
		x.t.Fatalf("%s: %v", sql, err)
	}
	return n
}

// metric returns the value of the metric whose line begins so, or -1.
func (x *spending) metric(line string) float64 {
	x.t.Helper()
	response, err := http.Get("http://" + x.s.Metrics + "/metrics") //nolint:noctx // the test has a deadline
	if err != nil {
		x.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		x.t.Fatal(err)
	}
	for text := range strings.Lines(string(body)) {
		if rest, ok := strings.CutPrefix(text, line+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				x.t.Fatal(err)
			}
			return v
		}
	}
	return -1
}

// settled waits until so many events have their verdict.
func (x *spending) settled(n int) {
	x.t.Helper()
	natstest.Until(x.t, fmt.Sprintf("%d events have their verdict", n), func() bool {
		return x.number(`SELECT count(*) FROM decuwatch.events`) == float64(n)
	})
}

// reconciled fails unless every message of the stream has one verdict.
func (x *spending) reconciled(scores, skips int) {
	x.t.Helper()
	report, err := reconcile.Run(x.t.Context(), reconcile.Options{
		JetStream: x.js, Store: x.store, Events: x.c.Stream.Name, Alerts: x.c.Alerts.Stream,
	})
	if err != nil {
		x.t.Fatal(err)
	}
	if !report.Agrees() || report.Scores != scores || report.Skips != skips || report.Waiting != 0 {
		x.t.Errorf("reconcile says %+v, want %d scores and %d skips", report, scores, skips)
	}
}

// withRules returns a configuration with rules.
func withRules(t *testing.T, c Config, samplingRules, budgetRules string) Config {
	t.Helper()
	if err := c.Sampling.Rules.UnmarshalText([]byte(samplingRules)); err != nil {
		t.Fatal(err)
	}
	if err := c.Budget.Rules.UnmarshalText([]byte(budgetRules)); err != nil {
		t.Fatal(err)
	}
	return c
}

// The shipped ensemble scores a share of two classes, by label and by class, and all of a class with few images and of
// an unknown one. Every event has its verdict with its probability, a redelivery after the consumer is gone draws the
// same, and the views estimate what was published.
func TestSampledServing(t *testing.T) {
	c := serveConfig(t)
	c.Scoring.Ensembles = []string{"../../ensembles/fashion-mnist"}
	c = withRules(t, c, `[{class: Bag, share: 0.3}, {model: fashion-mnist, labels: {tenant: coat}, share: 0.5}]`, ``)
	x := spend(t, c)
	x.serve()
	const n = 30
	const model = "fashion-mnist"
	x.publish(model, "bag", schema.ClassLabel("Bag"), n)
	x.publish(model, "coat", schema.ClassIndex(4), n)
	x.publish(model, "dress", schema.ClassLabel("Dress"), 3)
	x.publish(model, "rare", schema.ClassLabel("Sandal"), 3)
	x.publish(model, "nowhere", schema.ClassLabel("Spoon"), 3)
	x.settled(2*n + 9)
	scores := 6
	for prefix, share := range map[string]float64{"bag": 0.3, "coat": 0.5} {
		selected, probability := 0, 0.0
		for i := range n {
			id := fmt.Sprintf("%s-%d", prefix, i)
			outcome, want := "skip", "skip"
			if sampling.Uniform("decuwatch", "sample", "//test", id) < share {
				want = "score"
				selected++
			}
			err := x.conn.QueryRow(t.Context(), `SELECT outcome, coalesce(s.inclusion_probability, k.inclusion_probability)
				FROM decuwatch_views.events e LEFT JOIN decuwatch_views.scores s USING (source, event_id)
				LEFT JOIN decuwatch_views.skips k USING (source, event_id) WHERE event_id = $1`, id).Scan(&outcome, &probability)
			if err != nil || outcome != want || probability != share {
				t.Errorf("%s is a %s with probability %g, want a %s with %g: %v", id, outcome, probability, want, share, err)
			}
		}
		scores += selected
		if requests := x.number(`SELECT sum(requests) FROM decuwatch_views.class_risk_hourly WHERE lower(class_label) = $1`,
			prefix); math.Abs(requests-float64(selected)/share) > 1e-9 {
			t.Errorf("%s: %g requests are estimated from %d", prefix, requests, selected)
		}
	}
	if n := x.number(`SELECT count(*) FROM decuwatch_views.scores WHERE inclusion_probability = 1`); n != 6 {
		t.Errorf("%g events were scored for sure, want 6", n)
	}
	if dead := x.number(`SELECT count(*) FROM decuwatch_views.dead_letters WHERE kind = 'unknown_class'`); dead != 3 {
		t.Errorf("%g events of an unknown class are dead letters", dead)
	}
	skips := 2*n + 6 - scores
	if got := x.metric(`decuwatch_events_total{model="fashion-mnist",outcome="skip",reason="sampled_out"}`); got !=
		float64(skips) {
		t.Errorf("%g events are counted as sampled out, %d are", got, skips)
	}
	if got := x.number(`SELECT sum(n) FROM decuwatch_views.coverage WHERE reason = 'sampled_out'`); got != float64(skips) {
		t.Errorf("coverage counts %g events as sampled out, %d are", got, skips)
	}
	x.reconciled(scores, skips)
}

// When the rows are used up, further events are recorded as skipped. None is without a verdict.
func TestBudgetSkips(t *testing.T) {
	c := withRules(t, serveConfig(t), ``, `[{rows-per-day: 2000, policy: skip}]`)
	x := spend(t, c)
	x.serve()
	rows := x.s.Engines["tiny"].Rows(scoring.Request{})
	n := 2000/rows + 20
	x.publish("tiny", "e", schema.ClassIndex(0), n)
	x.settled(n)
	scored := x.number(`SELECT count(*) FROM decuwatch.scores`)
	skipped := x.number(`SELECT count(*) FROM decuwatch.skips WHERE reason = 'budget' AND inclusion_probability IS NULL`)
	if spent := x.number(`SELECT coalesce(sum(unet_rows), 0) FROM decuwatch.scores`); spent > 2000+2000.0/86400*60 ||
		spent < 2000-float64(2*rows) || scored+skipped != float64(n) {
		t.Errorf("%g events of %d rows were scored, %g rows in all, and %g of %d skipped", scored, rows, spent, skipped, n)
	}
	x.reconciled(int(scored), int(skipped))
	if got := x.metric(`decuwatch_budget_rows{model="tiny",period="day"}`); got != 2000 {
		t.Errorf("the budget's metric is %g", got)
	}
	natstest.Until(t, "the metric shows what is spent", func() bool {
		return x.metric(`decuwatch_budget_spent_rows{model="tiny",period="day"}`) > 2000-float64(2*rows)
	})
}

// While the rows are used up, events stay in the stream; they are scored when there is room, on their first delivery. A
// worker that is stopped meanwhile hands them back at once, and that counts for nothing.
func TestBudgetDefers(t *testing.T) {
	c := serveConfig(t)
	c.Consumers.AckWait, c.Stream.CheckInterval = 2*time.Second, time.Second
	const perSecond = 1000
	c = withRules(t, c, ``, fmt.Sprintf(`[{model: tiny, rows-per-hour: %d, policy: defer}]`, 3600*perSecond))
	x := spend(t, c)
	book := func(rows float64) {
		t.Helper()
		if _, err := x.store.BookRows(t.Context(), "tiny", postgres.Bucket{Hour: 3600 * perSecond}, rows); err != nil {
			t.Fatal(err)
		}
	}
	book(3600 * (perSecond + 100)) // room in 6 minutes
	x.serve()
	const n = 20
	x.publish("tiny", "e", schema.ClassIndex(0), n)
	deferred := func() bool { return x.metric(`decuwatch_deferred_events{model="tiny"}`) == n }
	natstest.Until(t, "all events are deferred", deferred)
	natstest.Until(t, "it is known when they expire", func() bool {
		left := x.metric(`decuwatch_deferred_expire_seconds{model="tiny"}`)
		return left > 167*3600 && left < 168*3600
	})
	// They are kept in flight for longer than the server would wait.
	before := time.Now()
	natstest.Until(t, "AckWait has passed", func() bool { return time.Since(before) > 5*time.Second })
	if got := x.metric(`decuwatch_redeliveries_total{model="tiny"}`); got != 0 || !deferred() {
		t.Errorf("%g deferred events were delivered again", got)
	}
	stopping := time.Now()
	x.stop()
	if took := time.Since(stopping); took > c.Consumers.DrainTimeout {
		t.Errorf("a worker with deferred events stops after %s", took)
	}
	if n := x.number(`SELECT count(*) FROM decuwatch.events`); n != 0 {
		t.Errorf("%g events have a verdict", n)
	}
	x.serve()
	natstest.Until(t, "all events are deferred again", deferred)
	book(-3600 * 101)
	x.settled(n)
	if got := x.number(`SELECT count(*) FROM decuwatch.scores`); got != n {
		t.Errorf("%g events were scored", got)
	}
	if got := x.number(`SELECT coalesce(max(failed + watched + alone), 0) FROM decuwatch.tries`); got != 0 {
		t.Errorf("a deferral counts as %g attempts", got)
	}
	x.reconciled(n, 0)
}

// Rows that events would cost beyond the budget lower the share that is scored. Each event keeps its probability.
func TestBudgetSamples(t *testing.T) {
	c := withRules(t, serveConfig(t), ``, `[{rows-per-hour: 10000, policy: sample}]`)
	c.Sampling.FewImages = 0
	x := spend(t, c)
	if _, err := x.store.BookRows(t.Context(), "tiny", postgres.Bucket{Hour: 10000}, 7500); err != nil {
		t.Fatal(err)
	}
	x.serve()
	natstest.Until(t, "half of the events are scored", func() bool {
		return x.metric(`decuwatch_sampling_share{model="tiny"}`) == 0.5
	})
	const n = 40
	x.publish("tiny", "e", schema.ClassIndex(0), n)
	x.settled(n)
	kept := x.number(`SELECT count(*) FROM decuwatch.scores WHERE inclusion_probability BETWEEN 0.25 AND 0.5`)
	lost := x.number(`SELECT count(*) FROM decuwatch.skips WHERE inclusion_probability BETWEEN 0.25 AND 0.5`)
	if kept+lost != n || kept == 0 || lost == 0 {
		t.Errorf("%g events are scored and %g sampled out, of %d", kept, lost, n)
	}
	if got := x.number(`SELECT count(*) FROM decuwatch_views.shares
		WHERE share = 0.5 AND reason LIKE '%rows of the hour%'`); got != 1 {
		t.Errorf("%g changes of the share are recorded", got)
	}
	x.reconciled(int(kept), int(lost))
}

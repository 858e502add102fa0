package review_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring"
)

const (
	tiny    = "../scoring/testdata/tiny"
	shipped = "../ensembles/fashion-mnist"
	// patience bounds every wait. It is far above what anything here needs, so that a slow machine does not fail a test.
	patience = 2 * time.Minute
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	goleak.VerifyTestMain(m, goleak.Cleanup(os.Exit))
}

// bench is a database and an engine, with what is needed to fill the one from the other.
type bench struct {
	t      testing.TB
	url    string
	store  *postgres.Store
	engine *scoring.Engine
	n      int
}

func newBench(t testing.TB, ensemble string) *bench {
	t.Helper()
	b := &bench{t: t, url: pgtest.URL(t), engine: openEngine(t, ensemble)}
	b.store = b.open()
	return b
}

func openEngine(t testing.TB, ensemble string) *scoring.Engine {
	t.Helper()
	e, err := scoring.Open(ensemble, scoring.Options{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// open returns another store on the same database.
func (b *bench) open() *postgres.Store {
	b.t.Helper()
	s, err := postgres.Open(b.t.Context(), postgres.Config{URL: b.url, MaxConns: 16, LockTimeout: patience,
		StatementTimeout: patience, CommitTimeout: patience})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(s.Close)
	return s
}

// request is a generation event that is scored and recorded.
type request struct {
	class   int
	seed    uint64
	labels  map[string]string
	alert   schema.Severity // severity of the alert on its class gap, or ""
	limit   float64         // threshold of the model that it reached. Defaults to the class's, a tenth below
	both    bool            // a critical alert on its request risk, too
	sampled bool
	source  string // Defaults to /review/test
	ago     time.Duration
}

// record scores a request for real, records its verdict, and returns the score and the id of its review, "" without
// one.
func (b *bench) record(r request) (schema.Score, string) {
	b.t.Helper()
	b.n++
	if r.source == "" {
		r.source = "/review/test"
	}
	ev := schema.Event{
		Source: r.source, ID: fmt.Sprintf("event-%d", b.n), Time: time.Now().Add(-r.ago).UTC().Truncate(time.Microsecond),
		Data: schema.Generation{Model: b.engine.Ensemble().Name, Class: schema.ClassIndex(r.class), Seed: r.seed,
			Labels: r.labels},
	}
	result, err := b.engine.Score(b.t.Context(), scoring.Request{Key: ev.Source + "\n" + ev.ID, Class: r.class,
		Seed: r.seed})
	if err != nil {
		b.t.Fatal(err)
	}
	score := monitor.Compose(ev, r.class, b.engine.Ensemble().Classes[r.class].Label, result, nil, ev.Time)
	return score, b.commit(score, r)
}

// commit records the verdict on a score.
func (b *bench) commit(score schema.Score, r request) string {
	b.t.Helper()
	ev := score.Event
	digest := sha256.Sum256([]byte(ev.Source + ev.ID))
	v := schema.Verdict{Delivery: schema.Delivery{Stream: "GENERATION", Sequence: uint64(b.n), Delivered: 1,
		Digest: hex.EncodeToString(digest[:])}, Score: &score, Sampled: r.sampled}
	id := ""
	if r.sampled {
		id = postgres.SampleID(ev.Identity())
	}
	if r.alert != "" {
		reason := schema.ReasonModel
		if r.limit == 0 {
			reason, r.limit = schema.ReasonClass, score.ClassGap.Value*0.9
		}
		id = hex.EncodeToString(digest[:16])
		v.Alerts = []schema.Alert{{
			ID: id, Kind: "score", Source: ev.Source, EventID: ev.ID, EventTime: ev.Time, Model: ev.Data.Model,
			ClassIndex: r.class, ClassLabel: score.ClassLabel,
			Labels: r.labels, Severity: r.alert, Reason: reason, Measurement: schema.ClassGap, Value: score.ClassGap.Value,
			Decided:   score.ClassGap.Value,
			Threshold: r.limit, ThresholdID: 1, ClassGap: score.ClassGap.Value, RequestRisk: &score.RequestRisk.Value,
			Receipt: score.Receipt, FiredAt: ev.Time,
		}}
		if r.both {
			second := v.Alerts[0]
			second.ID, second.Severity = hex.EncodeToString(digest[16:]), schema.SeverityCritical
			second.Measurement, second.Value = schema.RequestRisk, score.RequestRisk.Value
			second.Decided = second.Value
			v.Alerts, id = append(v.Alerts, second), second.ID
			if r.alert == schema.SeverityCritical { // alike severe: the first stands for both
				id = v.Alerts[0].ID
			}
		}
	}
	if _, err := b.store.Record(b.t.Context(), v); err != nil {
		b.t.Fatal(err)
	}
	return id
}

// until waits for a condition, for as long as patience lasts.
func until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if condition() {
			return
		}
	}
	t.Fatalf("%s: not so after %s", what, patience)
}

// running runs f until the test ends, and waits for it.
func running(t testing.TB, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

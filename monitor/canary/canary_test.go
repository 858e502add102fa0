package canary_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor/canary"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

const tiny = "../../scoring/testdata/tiny"

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	goleak.VerifyTestMain(m, goleak.Cleanup(os.Exit))
}

func TestClasses(t *testing.T) {
	class := func(images ...int) ensemble.Class { return ensemble.Class{Label: fmt.Sprint(images), Images: images} }
	rare, err := canary.Classes(&ensemble.Manifest{
		Classes: []ensemble.Class{class(5000, 5000), class(1, 1), class(100, 100), class(0, 2)},
	})
	if err != nil || fmt.Sprint(rare) != "[1 3]" {
		t.Errorf("%v, %v", rare, err)
	}
	_, err = canary.Classes(&ensemble.Manifest{Name: "even", Classes: []ensemble.Class{class(100), class(90)}})
	if !errors.Is(err, canary.ErrNoClass) {
		t.Errorf("an ensemble without a rare class has a canary: %v", err)
	}
}

// stream keeps what is published.
type stream struct {
	mu   sync.Mutex
	sent []schema.Event
}

func (s *stream) publish(_ context.Context, ev schema.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, _, err := schema.Encode(ev); err != nil {
		return err
	}
	s.sent = append(s.sent, ev)
	return nil
}

// record scores an event for real, and records the score with an alert on it.
func record(t *testing.T, store *postgres.Store, engine *scoring.Engine, ev schema.Event) {
	t.Helper()
	class := ev.Data.Class.Index
	result, err := engine.Score(t.Context(), scoring.Request{Key: ev.Source + "\n" + ev.ID, Class: class,
		Seed: ev.Data.Seed})
	if err != nil {
		t.Fatal(err)
	}
	score := schema.Score{
		Event: ev, ClassIndex: class, ClassLabel: engine.Ensemble().Classes[class].Label,
		ClassGap: schema.Measurement(result.ClassGap), RequestRisk: new(schema.Measurement(*result.RequestRisk)),
		Receipt: schema.Receipt(result.Receipt), ScoredAt: ev.Time,
	}
	gap := score.ClassGap.Value
	header, payload, err := schema.Encode(ev)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Record(t.Context(), schema.Verdict{
		Delivery: schema.Delivery{Stream: "GENERATION", Sequence: 1, Delivered: 1, Digest: schema.Digest(header, payload)},
		Score:    &score,
		Alerts: []schema.Alert{{
			ID: schema.ID(ev.ID), Kind: schema.AlertScore, Source: ev.Source, EventID: ev.ID, EventTime: ev.Time,
			Model: ev.Data.Model, ClassIndex: class, ClassLabel: score.ClassLabel, Labels: ev.Data.Labels,
			Severity: schema.SeverityWarn, Reason: schema.ReasonClass, Measurement: schema.ClassGap,
			Value: gap, Decided: gap, Threshold: gap * 0.9, ThresholdID: 1,
			ClassGap: gap, RequestRisk: &score.RequestRisk.Value, Receipt: score.Receipt, FiredAt: ev.Time,
		}},
	}); err != nil {
		t.Fatal(err)
	}
}

// A canary that an alert fires on is caught. One that no alert fires on raises one alert, whoever decides.
func TestCanary(t *testing.T) {
	engine, err := scoring.Open(tiny, scoring.Options{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	}()
	store := pgtest.Open(t, postgres.Config{})
	manifests := []*ensemble.Manifest{&engine.Ensemble().Manifest}
	var events stream
	reg := prometheus.NewRegistry()
	w, err := canary.New(store, events.publish, manifests, canary.Config{Deadline: time.Hour, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	caught, err := w.Send(t.Context(), "tiny")
	if err != nil {
		t.Fatal(err)
	}
	if len(events.sent) != 1 || events.sent[0].ID != caught.EventID ||
		events.sent[0].Data.Class.Index != caught.ClassIndex || events.sent[0].Data.Labels[schema.LabelCanary] == "" {
		t.Fatalf("published %+v", events.sent)
	}
	if closed, err := w.Decide(t.Context()); err != nil || len(closed) != 0 {
		t.Errorf("decided before its time: %+v, %v", closed, err)
	}
	record(t, store, engine, events.sent[0])
	if closed, err := w.Decide(t.Context()); err != nil || len(closed) != 1 || closed[0].Outcome != postgres.CanaryCaught {
		t.Errorf("%+v, %v", closed, err)
	}

	late, err := canary.New(store, events.publish, manifests, canary.Config{Deadline: time.Microsecond})
	if err != nil {
		t.Fatal(err)
	}
	missed, err := late.Send(t.Context(), "tiny")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	decided := make(chan int, 4)
	for range cap(decided) { // several processes look at once
		running.Go(func() {
			closed, err := w.Decide(t.Context())
			if err != nil {
				t.Error(err)
			}
			decided <- len(closed)
		})
	}
	running.Wait()
	close(decided)
	total := 0
	for n := range decided {
		total += n
	}
	raised, err := store.Alerts(t.Context(), postgres.AlertFilter{Kind: schema.AlertCanaryMissed})
	if err != nil || total != 1 || len(raised) != 1 || raised[0].EventID != missed.EventID ||
		raised[0].Severity != schema.SeverityCritical || !strings.Contains(raised[0].Detail, "was not scored") {
		t.Errorf("%d decided, alerts %+v, %v", total, raised, err)
	}
	counts, err := store.CanaryCounts(t.Context(), "tiny", time.Now().Add(-time.Hour))
	if err != nil || counts["caught"] != 1 || counts["missed"] != 1 {
		t.Errorf("%v, %v", counts, err)
	}
	if err := testutil.CollectAndCompare(reg, strings.NewReader(
		`# HELP decuwatch_canaries_total Canaries by outcome: caught by an alert in time, or missed.
# TYPE decuwatch_canaries_total counter
decuwatch_canaries_total{model="tiny",outcome="caught"} 1
decuwatch_canaries_total{model="tiny",outcome="missed"} 1
`), "decuwatch_canaries_total"); err != nil {
		t.Error(err)
	}
}

// Run publishes at once, decides by itself, and ends when it is told. Once reports a canary that was missed.
func TestRun(t *testing.T) {
	e, err := ensemble.Open(tiny)
	if err != nil {
		t.Fatal(err)
	}
	store := pgtest.Open(t, postgres.Config{})
	var events stream
	w, err := canary.New(store, events.publish, []*ensemble.Manifest{&e.Manifest},
		canary.Config{Every: time.Hour, Deadline: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	natstest.Until(t, "a canary is missed", func() bool {
		counts, err := store.CanaryCounts(t.Context(), "tiny", time.Now().Add(-time.Hour))
		return err == nil && counts["missed"] == 1
	})
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	var reports []postgres.CanaryOutcome
	err = w.Once(t.Context(), func(c postgres.Canary) { reports = append(reports, c.Outcome) })
	if !errors.Is(err, canary.ErrMissed) || len(reports) != 2 || reports[0] != "" || reports[1] != postgres.CanaryMissed {
		t.Errorf("Once reports %q, %v", reports, err)
	}
}

package patrol

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/alerts/drift"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

const (
	digest = "2222222222222222222222222222222222222222222222222222222222222222"
	other  = "3333333333333333333333333333333333333333333333333333333333333333"
	fixed  = "fixed"
)

// history records scores one after the other.
type history struct {
	t     *testing.T
	store *postgres.Store
	n     uint64
}

// add records a score, with an alert of the given severity if there is one.
func (h *history) add(class int, at time.Time, gap, risk float64, severity schema.Severity) {
	h.t.Helper()
	h.n++
	at = at.UTC().Truncate(time.Microsecond)
	measurement := func(v float64) schema.Measurement {
		return schema.Measurement{Estimator: "paide-w2", Value: v, MeanDistance: v}
	}
	s := &schema.Score{
		Event: schema.Event{Source: "//test", ID: fmt.Sprint(h.n), Time: at,
			Data: schema.Generation{Model: "m", Class: schema.ClassIndex(class)}},
		ClassIndex: class, ClassLabel: fmt.Sprint("class ",
			class), ClassGap: measurement(gap), RequestRisk: new(measurement(risk)), ScoredAt: at,
		Receipt: schema.Receipt{EnsembleDigest: digest, Settings: fixed, Profile: "fixed", Steps: 20},
	}
	v := schema.Verdict{Delivery: schema.Delivery{Stream: "GENERATION", Sequence: h.n, Delivered: 1,
		Digest: schema.Digest(nil, []byte(s.Event.ID))}, Score: s}
	if severity != "" {
		v.Alerts = []schema.Alert{{
			ID: fmt.Sprint("alert-", h.n), Kind: schema.AlertScore, Source: s.Event.Source, EventID: s.Event.ID, EventTime: at,
			Model: "m", ClassIndex: class, ClassLabel: s.ClassLabel,
			Severity: severity, Reason: schema.ReasonClass, Measurement: schema.ClassGap, Value: gap, Decided: gap,
			Receipt: s.Receipt, FiredAt: at,
		}}
	}
	if _, err := h.store.Record(h.t.Context(), v); err != nil {
		h.t.Fatal(err)
	}
}

func newPatrol(t *testing.T, store *postgres.Store, c Config, reference drift.Reference) *Patrol {
	t.Helper()
	c.Registerer = prometheus.NewRegistry()
	p, err := New(c, []Model{{Name: "m", EnsembleDigest: digest, Settings: fixed, WellSampled: []int{0},
		Reference: reference}}, store, store, store)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func raised(t *testing.T, store *postgres.Store, kind schema.AlertKind) []schema.Alert {
	t.Helper()
	found, err := store.Alerts(t.Context(), postgres.AlertFilter{Kind: kind})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestVolumeAndSummaries(t *testing.T) {
	for { // until no hour ended meanwhile
		hour := time.Now().Truncate(time.Hour)
		store := pgtest.Open(t, postgres.Config{Volume: postgres.Volume{ClassPerHour: 3, ModelPerHour: 5}})
		h := &history{t: t, store: store}
		for range 7 {
			h.add(1, hour, 1, 0, schema.SeverityWarn) // 3 are sent
		}
		for range 4 {
			h.add(2, hour, 1, 0, schema.SeverityWarn) // 2 are sent, then the model's budget is spent
		}
		h.add(1, hour, 1, 0, schema.SeverityCritical) // has a budget of its own
		if !time.Now().Truncate(time.Hour).Equal(hour) {
			continue
		}
		due, err := store.OutboxNext(t.Context(), schema.SinkStream, 100, time.Minute)
		if err != nil || len(due) != 6 {
			t.Errorf("%d alerts are sent, want 6 (%v)", len(due), err)
		}
		if all := raised(t, store, schema.AlertScore); len(all) != 12 {
			t.Errorf("%d alerts are stored, want all 12", len(all))
		}
		p := newPatrol(t, store, Config{}, drift.Reference{})
		if err := p.Summaries(t.Context(), hour.Add(time.Hour)); err != nil ||
			len(raised(t, store, schema.AlertSummary)) != 0 {
			t.Errorf("summed up before the hour had settled: %v", err)
		}
		for range 2 {
			if err := p.Summaries(t.Context(), hour.Add(time.Hour+2*time.Minute)); err != nil {
				t.Fatal(err)
			}
		}
		counts := map[int]int{}
		for _, a := range raised(t, store, schema.AlertSummary) {
			counts[a.ClassIndex] = a.Count
			if a.Severity != schema.SeverityWarn || !strings.Contains(a.Detail, "were not sent") {
				t.Errorf("%+v", a)
			}
		}
		if fmt.Sprint(counts) != "map[1:4 2:2]" {
			t.Errorf("summaries count %v, want 4 of class 1 and 2 of class 2", counts)
		}
		for reason, want := range map[string]float64{"class_budget": 4, "model_budget": 2, "cool_down": 0} {
			if got := testutil.ToFloat64(p.metrics.heldBack.WithLabelValues("m", reason)); got != want {
				t.Errorf("metric of %s is %g, want %g", reason, got, want)
			}
		}
		// Summaries are sent themselves.
		if due, err := store.OutboxNext(t.Context(), schema.SinkStream, 100, time.Minute); err != nil || len(due) != 2 {
			t.Errorf("%d summaries are sent, want 2 (%v)", len(due), err)
		}
		return
	}
}

func TestCoolDown(t *testing.T) {
	store := pgtest.Open(t, postgres.Config{Volume: postgres.Volume{CoolDown: time.Hour}})
	h := &history{t: t, store: store}
	for _, class := range []int{1, 1, 2, 1} {
		h.add(class, time.Now(), 1, 0, schema.SeverityWarn)
	}
	h.add(1, time.Now(), 1, 0, schema.SeverityCritical)
	due, err := store.OutboxNext(t.Context(), schema.SinkStream, 100, time.Minute)
	if err != nil || len(due) != 3 {
		t.Errorf("%d alerts are sent, want one of class 1, one of class 2 and the critical one (%v)", len(due), err)
	}
}

func TestClassDrift(t *testing.T) {
	store := pgtest.New(t)
	h := &history{t: t, store: store}
	r := rand.New(rand.NewPCG(1, 1))
	reference := make([]float64, 500)
	for i := range reference {
		reference[i] = 0.03 + 0.005*r.NormFloat64()
	}
	begin := time.Now().Add(-time.Hour)
	for i := range 30 {
		at := begin.Add(time.Duration(i) * time.Minute)
		h.add(0, at, 0.03+0.005*r.NormFloat64(), 0, "")       // as the reference
		h.add(1, at, 0.05+0.01*r.NormFloat64(), 0, "")        // always uncertain
		h.add(2, at, 0.02+0.001*r.NormFloat64(), 0, "")       // surer than the reference
		h.add(3, at, 0.03+0.0006*float64(max(0, i-5)), 0, "") // rises slowly
	}
	p := newPatrol(t, store, Config{RunLength: 1000}, drift.NewReference(reference, nil))
	for range 2 { // the second look finds what has its alert already
		if err := p.ClassDrift(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	got := map[int]schema.Alert{}
	for _, a := range raised(t, store, schema.AlertClassDrift) {
		got[a.ClassIndex] = a
	}
	if len(got) != 2 || got[1].ID == "" || got[3].ID == "" {
		t.Fatalf("alerts on %v, want classes 1 and 3", got)
	}
	if a := got[1]; a.ClassLabel != "class 1" || a.Count > 15 || a.Decided < 1000 || a.Threshold != 1000 ||
		a.Value < 0.04 || a.Receipt.EnsembleDigest != digest {
		t.Errorf("%+v", a)
	}
	if got[3].Count <= got[1].Count {
		t.Errorf("the slow rise was noticed after %d requests, the plain one after %d", got[3].Count, got[1].Count)
	}
	if n := testutil.ToFloat64(p.metrics.raised.WithLabelValues("m", string(schema.AlertClassDrift))); n != 2 {
		t.Errorf("the metric counts %g", n)
	}
	// After the quiet time the class's new scores count again.
	for i := range 30 {
		h.add(1, got[1].EventTime.Add(24*time.Hour+time.Duration(i+1)*time.Second), 0.05, 0, "")
	}
	if err := p.ClassDrift(t.Context(), time.Now().Add(25*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if n := len(raised(t, store, schema.AlertClassDrift)); n != 3 {
		t.Errorf("%d alerts of drift, want 3", n)
	}
	// Without a reference nothing is raised.
	if err := newPatrol(t, store, Config{}, drift.Reference{}).ClassDrift(t.Context(), time.Now()); err != nil {
		t.Error(err)
	}
}

func set(t *testing.T, store *postgres.Store, ensembleDigest string, value float64) {
	t.Helper()
	alpha := 0.1
	_, err := store.SetThreshold(t.Context(), schema.Threshold{
		Model: "m", EnsembleDigest: ensembleDigest, Settings: fixed, Measurement: schema.ClassGap, Scope: schema.ScopeModel,
		Severity: schema.SeverityWarn,
		Value:    value, Origin: "calibrated", Alpha: &alpha, SetBy: "test", Reason: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestStale(t *testing.T) {
	store := pgtest.New(t)
	p := newPatrol(t, store, Config{}, drift.Reference{})
	stale := func() float64 {
		t.Helper()
		for range 2 {
			if err := p.Stale(t.Context(), time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		return testutil.ToFloat64(p.metrics.stale.WithLabelValues("m", string(schema.ClassGap)))
	}
	if got := stale(); got != 0 || len(raised(t, store, schema.AlertThresholdMissing)) != 0 {
		t.Errorf("a model without thresholds is stale: %g", got)
	}
	set(t, store, other, 1)
	if got := stale(); got != 1 {
		t.Errorf("the metric is %g", got)
	}
	if got := raised(t, store, schema.AlertThresholdMissing); len(got) != 1 ||
		got[0].Severity != schema.SeverityCritical || got[0].ClassIndex != -1 || got[0].Measurement != schema.ClassGap {
		t.Errorf("%+v", got)
	}
	set(t, store, digest, 1)
	if got := stale(); got != 0 || len(raised(t, store, schema.AlertThresholdMissing)) != 1 {
		t.Errorf("the metric is %g after the calibration", got)
	}
	// Rollbacks until no threshold is left: missing, each time that it happens.
	for i := range 2 {
		for {
			if _, err := store.RollbackThresholds(t.Context(), "test", "test"); errors.Is(err, postgres.ErrNotFound) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		got := stale()
		if all := raised(t, store, schema.AlertThresholdMissing); got != 1 || len(all) != 2+i ||
			!strings.Contains(all[0].Detail, "left no threshold of class_gap") {
			t.Errorf("round %d: the metric is %g, %+v", i, got, all)
		}
		set(t, store, digest, 1)
	}
	if got := stale(); got != 0 {
		t.Errorf("the metric is %g after the last calibration", got)
	}
}

func TestShadow(t *testing.T) {
	store := pgtest.New(t)
	h := &history{t: t, store: store}
	for i := range 100 {
		h.add(0, time.Now().Add(-time.Hour), float64(i), 0, "")
		if i < 20 {
			h.add(1, time.Now().Add(-time.Hour), 1e6, 0, "") // not a class that the model should know
		}
	}
	p := newPatrol(t, store, Config{}, drift.Reference{})
	look := func() float64 {
		t.Helper()
		if err := p.Shadow(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
		return testutil.ToFloat64(p.metrics.shadow.WithLabelValues("m", string(schema.ClassGap)))
	}
	if got := look(); got != 0 {
		t.Errorf("%g without a threshold", got)
	}
	set(t, store, digest, 45)
	// The quantile at 0.9 of 0 … 99 is 89.
	if got := look(); math.Abs(got-89.0/45) > 1e-9 {
		t.Errorf("the ratio is %g, want %g", got, 89.0/45)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{{Every: -1}, {RunLength: 1}, {RunLength: math.NaN()}, {Newest: -1}} {
		if _, err := New(c, nil, nil, nil, nil); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

// The class gaps that were measured are held against the closed form of the manifest. Classes with few scores, and
// classes of which the manifest says nothing, are left alone.
func TestClosedForm(t *testing.T) {
	store := pgtest.Open(t, postgres.Config{})
	h := &history{t: t, store: store}
	now := time.Now()
	for class, gap := range []float64{0.5, 2, 9, 1, 1} {
		for i := range 5 - class/4 {
			h.add(class, now.Add(-time.Duration(i)*time.Minute), gap, 0, "")
		}
	}
	h.add(0, now.Add(-8*24*time.Hour), 1e6, 0, "") // long ago
	var log strings.Builder
	p, err := New(Config{Registerer: prometheus.NewRegistry(), Log: slog.New(slog.NewTextHandler(&log, nil))},
		[]Model{{Name: "m", EnsembleDigest: digest, Settings: fixed, Expected: map[int]float64{0: 1, 1: 1, 2: 1, 4: 1e-9}},
			{Name: "unknown", EnsembleDigest: digest, Settings: fixed}}, store, store, store)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.ClosedForm(t.Context(), now); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		model, end string
		want       float64
	}{{"m", endLeast, 0.5}, {"m", endGreatest, 9}, {"unknown", endLeast, 0}, {"unknown", endGreatest, 0}} {
		if got := testutil.ToFloat64(p.metrics.closedForm.WithLabelValues(c.model, c.end)); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("the %s ratio of %s is %g, want %g", c.end, c.model, got, c.want)
		}
	}
	if n := strings.Count(log.String(), "far from"); n != 1 || !strings.Contains(log.String(), `class="class 2"`) {
		t.Errorf("%d lines, want one about class 2:\n%s", n, log.String())
	}
}

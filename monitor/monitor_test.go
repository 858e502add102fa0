package monitor_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.uber.org/goleak"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// scorer answers with the given results in turn, and keeps the requests.
type scorer struct {
	requests []scoring.Request
	answer   func(scoring.Request) (scoring.Result, error)
	refuse   func(scoring.Request) error // before any work; nil refuses nothing
}

func (s *scorer) Validate(r scoring.Request) error {
	if s.refuse == nil {
		return nil
	}
	return s.refuse(r)
}

func (s *scorer) Score(_ context.Context, r scoring.Request) (scoring.Result, error) {
	s.requests = append(s.requests, r)
	if err := s.Validate(r); err != nil {
		return scoring.Result{}, err
	}
	return s.answer(r)
}

func (s *scorer) Rows(scoring.Request) int { return 7 }

// recorder keeps verdicts by source and id, as the ledger does.
type recorder struct {
	verdicts map[string]schema.Verdict
	order    []schema.Verdict
	err      error
	lookups  int
}

func (r *recorder) Recorded(_ context.Context, ev schema.Event, d schema.Delivery) (bool, error) {
	r.lookups++
	if r.err != nil {
		return false, r.err
	}
	v, ok := r.verdicts[ev.Source+" "+ev.ID]
	if ok && v.Delivery.Digest != d.Digest {
		return false, &schema.Invalid{Field: "id", Reason: "belongs to another event"}
	}
	return ok, nil
}

func (r *recorder) Record(_ context.Context, v schema.Verdict) (monitor.Recorded, error) {
	if r.err != nil {
		return monitor.Recorded{}, r.err
	}
	key := fmt.Sprint(v.Delivery.Sequence)
	switch {
	case v.Score != nil:
		key = v.Score.Event.Source + " " + v.Score.Event.ID
	case v.Skip != nil:
		key = v.Skip.Event.Source + " " + v.Skip.Event.ID
	}
	if first, ok := r.verdicts[key]; ok {
		if first.Delivery.Digest != v.Delivery.Digest {
			return monitor.Recorded{}, fmt.Errorf("record: %w", &schema.Invalid{Field: "id", Reason: "belongs to another event"})
		}
		return monitor.Recorded{}, nil
	}
	r.verdicts[key] = v
	r.order = append(r.order, v)
	return monitor.Recorded{First: true}, nil
}

// table decides by a fixed table of thresholds.
type table struct{ *alerts.Table }

func (t table) Decide(s schema.Score) alerts.Decision { return alerts.Decide(s, t.Table) }

var profile = scoring.Profile{
	GuidanceScale: 2,
	ClassGap: scoring.Measure{
		Tables: "members", Guidance: "own", Steps: 20, BranchStep: 0, RolloutSteps: 1, Estimator: "paide-w2",
	},
	RequestRisk: scoring.Measure{
		Tables: "members", Guidance: "own", Steps: 20, BranchStep: 10, RolloutSteps: 1, Estimator: "mean-w2",
	},
}

func result(r scoring.Request) (scoring.Result, error) {
	p := r.Profile
	if p == (scoring.Profile{}) {
		p = profile
	}
	m := scoring.Measurement{Estimator: "paide-w2", Value: 0.2, UpperBound: 1.6, MeanDistance: 0.5,
		Distances: [][]float64{{0, 1}, {1, 0}}, Shares: []float64{.5, .5}}
	risk := m
	risk.Value, risk.Saturated = 1.6, true
	return scoring.Result{ClassGap: m, RequestRisk: &risk, Receipt: scoring.Receipt{
		EnsembleDigest: strings.Repeat("a", 64), Settings: p.Settings(), Steps: p.RequestRisk.Steps, Seed: r.Seed,
		Noise: r.Noise, Rows: 7,
	}}, nil
}

type fixture struct {
	*monitor.Monitor
	scorer   *scorer
	recorder *recorder
	registry *prometheus.Registry
	log      *strings.Builder
	spans    *tracetest.InMemoryExporter
}

func newFixture(t *testing.T, model monitor.Model, thresholds ...schema.Threshold) *fixture {
	t.Helper()
	f := &fixture{scorer: &scorer{answer: result}, recorder: &recorder{verdicts: map[string]schema.Verdict{}},
		registry: prometheus.NewPedanticRegistry(), log: &strings.Builder{}, spans: tracetest.NewInMemoryExporter()}
	at, err := alerts.NewTable(thresholds)
	if err != nil {
		t.Fatal(err)
	}
	if model.Scorer == nil {
		model.Scorer = f.scorer
	}
	model.Classes, model.Profile = []string{"Trouser", "Bag"}, profile
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(f.spans))
	f.Monitor, err = monitor.New(map[string]monitor.Model{"m": model}, table{at}, f.recorder, monitor.Config{
		Registerer: f.registry, Tracer: provider.Tracer("test"), Log: slog.New(slog.NewTextHandler(f.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// handle plans and handles one delivery of an event.
func handle(ctx context.Context, m *monitor.Monitor, ev schema.Event, d schema.Delivery) error {
	_, handle, err := m.Plan(ctx, ev, d)
	if err != nil {
		return err
	}
	return handle(ctx, d)
}

func (f *fixture) Handle(ctx context.Context, ev schema.Event, d schema.Delivery) error {
	return handle(ctx, f.Monitor, ev, d)
}

func event(id string) schema.Event {
	return schema.Event{Source: "/s", ID: id, Time: time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC),
		Data: schema.Generation{Model: "m", Class: schema.ClassLabel("Bag"), Seed: 9}}
}

func first(sequence uint64) schema.Delivery {
	return schema.Delivery{Stream: "G", Sequence: sequence, Delivered: 1, Digest: "d"}
}

func critical(measurement schema.MeasurementName, value float64) schema.Threshold {
	return schema.Threshold{ID: 4, Model: "m", EnsembleDigest: strings.Repeat("a", 64), Settings: profile.Settings(),
		Measurement: measurement,
		Scope:       schema.ScopeModel, Severity: schema.SeverityCritical, Value: value}
}

func TestAnEventIsScoredDecidedAndCommitted(t *testing.T) {
	f := newFixture(t, monitor.Model{}, critical(schema.ClassGap, 0.1))
	ev := event("1")
	ctx := propagation.TraceContext{}.Extract(t.Context(), propagation.MapCarrier{
		"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	})
	if err := f.Handle(ctx, ev, first(1)); err != nil {
		t.Fatal(err)
	}
	if got, want := f.scorer.requests, []scoring.Request{{Key: "/s\n1", Class: 1, Seed: 9}}; !slices.Equal(got, want) {
		t.Errorf("scored %+v, want %+v", got, want)
	}
	v := f.recorder.order[0]
	if v.Score == nil || v.Score.ClassIndex != 1 || v.Score.ClassLabel != "Bag" || v.Score.ClassGap.Value != 0.2 ||
		v.Score.Receipt.Seed != 9 || v.Score.ScoredAt.IsZero() {
		t.Errorf("committed %+v", v.Score)
	}
	if len(v.Alerts) != 1 || v.Alerts[0].Measurement != schema.ClassGap || v.Alerts[0].ThresholdID != 4 {
		t.Errorf("alerts %+v", v.Alerts)
	}
	want := `
# HELP decuwatch_alerts_total Alerts that were committed, by severity and reason.
# TYPE decuwatch_alerts_total counter
decuwatch_alerts_total{model="m",reason="absolute_limit",severity="critical"} 0
decuwatch_alerts_total{model="m",reason="absolute_limit",severity="warn"} 0
decuwatch_alerts_total{model="m",reason="class_threshold",severity="critical"} 0
decuwatch_alerts_total{model="m",reason="class_threshold",severity="warn"} 0
decuwatch_alerts_total{model="m",reason="cluster_threshold",severity="critical"} 0
decuwatch_alerts_total{model="m",reason="cluster_threshold",severity="warn"} 0
decuwatch_alerts_total{model="m",reason="model_threshold",severity="critical"} 1
decuwatch_alerts_total{model="m",reason="model_threshold",severity="warn"} 0
# HELP decuwatch_saturated_scores_total Measurements at their upper bound, which were decided on their mean distance.
# TYPE decuwatch_saturated_scores_total counter
decuwatch_saturated_scores_total{measurement="class_gap",model="m"} 0
decuwatch_saturated_scores_total{measurement="image_risk",model="m"} 0
decuwatch_saturated_scores_total{measurement="request_risk",model="m"} 1
# HELP decuwatch_threshold_fallbacks_total Measurements that the class's own threshold did not decide, by the reason.
# TYPE decuwatch_threshold_fallbacks_total counter
decuwatch_threshold_fallbacks_total{model="m",reason="cluster"} 0
decuwatch_threshold_fallbacks_total{model="m",reason="missing"} 1
decuwatch_threshold_fallbacks_total{model="m",reason="model"} 1
decuwatch_threshold_fallbacks_total{model="m",reason="stale"} 0
`
	if err := testutil.GatherAndCompare(f.registry, strings.NewReader(want), "decuwatch_alerts_total",
		"decuwatch_saturated_scores_total", "decuwatch_threshold_fallbacks_total"); err != nil {
		t.Error(err)
	}
	// The spans continue the trace of the delivery, below one another.
	spans := map[string]tracetest.SpanStub{}
	for _, s := range f.spans.GetSpans() {
		spans[s.Name] = s
	}
	if handle := spans["handle"]; handle.SpanContext.TraceID().String() != "0af7651916cd43dd8448eb211c80319c" ||
		handle.Parent.SpanID().String() != "b7ad6b7169203331" {
		t.Errorf("handle has the context %v and the parent %v", handle.SpanContext, handle.Parent)
	}
	if got := spans["score"].Attributes; !slices.Contains(got, attribute.Int("decuwatch.rows", 7)) ||
		!slices.Contains(got, attribute.Int("decuwatch.steps", 20)) {
		t.Errorf("score has the attributes %v, want 7 rows and 20 steps", got)
	}
	for _, name := range []string{"score", "commit"} {
		if spans[name].Parent.SpanID() != spans["handle"].SpanContext.SpanID() {
			t.Errorf("span %s is not below handle", name)
		}
	}
}

func TestMissingThresholdIsLoggedOnceAndCounted(t *testing.T) {
	f := newFixture(t, monitor.Model{}, critical(schema.ClassGap, 9))
	for i := range 3 {
		if err := f.Handle(t.Context(), event(fmt.Sprint(i)), first(uint64(i+1))); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(f.log.String(), "no threshold applies"); n != 1 || !strings.Contains(f.log.String(),
		"measurement=request_risk") {
		t.Errorf("logged %d times:\n%s", n, f.log)
	}
}

// A cascade gives every event a cut, but for a share that the event's identity draws. The score says with which
// probability its request risk was to be measured.
func TestCascade(t *testing.T) {
	const n, share = 4000, 0.3
	for _, c := range []struct{ cut, probability float64 }{ // the class gap is 0.2
		{0.5, share}, {0.1, 1}, {0.2, 1}, {0, 1},
	} {
		f := newFixture(t, monitor.Model{Cascade: scoring.Cascade{Cut: c.cut, Share: share}})
		again := newFixture(t, monitor.Model{Cascade: scoring.Cascade{Cut: c.cut, Share: share}})
		whole := 0.0
		for i := range n {
			ev := event(fmt.Sprint(i))
			for _, f := range []*fixture{f, again} {
				if err := f.Handle(t.Context(), ev, first(uint64(i+1))); err != nil {
					t.Fatal(err)
				}
			}
			cut := f.scorer.requests[i].Cut
			if cut != again.scorer.requests[i].Cut {
				t.Fatalf("event %d has the cuts %v and %v", i, cut, again.scorer.requests[i].Cut)
			}
			if have := f.recorder.order[i].Score.RequestRiskProbability; have != c.probability {
				t.Fatalf("cut %v: probability %v, want %v", c.cut, have, c.probability)
			}
			if cut != 0 && cut != c.cut {
				t.Fatalf("cut %v", cut)
			}
			if cut == 0 {
				whole++
			}
		}
		if c.cut > 0 && math.Abs(whole/n-share) > 0.03 {
			t.Errorf("cut %v: a share of %v is measured whole, want %v", c.cut, whole/n, share)
		}
	}
}

func TestARedeliveryKeepsTheFirstVerdict(t *testing.T) {
	f := newFixture(t, monitor.Model{})
	again := first(1)
	again.Delivered = 2
	for _, d := range []schema.Delivery{first(1), again} {
		if err := f.Handle(t.Context(), event("1"), d); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.scorer.requests) != 1 || len(f.recorder.order) != 1 {
		t.Errorf("scored %d times, committed %d verdicts; want 1 and 1", len(f.scorer.requests), len(f.recorder.order))
	}
	// It is published again after the stream's duplicate window, with another sequence number.
	if err := f.Handle(t.Context(), event("1"), first(2)); err != nil {
		t.Fatal(err)
	}
	// It is delivered by a consumer that was created again or restored, and counts deliveries from one.
	if err := f.Handle(t.Context(), event("1"), first(1)); err != nil {
		t.Fatal(err)
	}
	if len(f.scorer.requests) != 1 || len(f.recorder.order) != 1 {
		t.Errorf("scored %d times, committed %d verdicts; want 1 and 1", len(f.scorer.requests), len(f.recorder.order))
	}
	if n := testutil.CollectAndCount(f.registry, "decuwatch_events_total"); n == 0 {
		t.Error("no events counted")
	}
}

func TestPermanentErrorsNameKindAndField(t *testing.T) {
	other := event("1")
	other.Data.Model = "other"
	index := event("1")
	index.Data.Class = schema.ClassIndex(2)
	label := event("1")
	label.Data.Class = schema.ClassLabel("Coat")
	for _, c := range []struct {
		name   string
		event  schema.Event
		score  error
		record error
		kind   schema.DeadLetterKind
		field  string
	}{
		{name: "model", event: other, kind: schema.KindUnknownModel, field: "data.model"},
		{name: "class index", event: index, kind: schema.KindUnknownClass, field: "data.class"},
		{name: "class label", event: label, kind: schema.KindUnknownClass, field: "data.class"},
		{name: "NaN", event: event("1"), score: &scoring.NonFiniteError{Step: 3}, kind: schema.KindNonFinite},
		{name: "id of another", event: event("1"), record: fmt.Errorf("record: %w",
			&schema.Invalid{Field: "id", Reason: "belongs to another event"}), kind: schema.KindDuplicateID, field: "id"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t, monitor.Model{})
			f.recorder.err = c.record
			if c.score != nil {
				f.scorer.answer = func(scoring.Request) (scoring.Result, error) { return scoring.Result{}, c.score }
			}
			err := f.Handle(t.Context(), c.event, first(1))
			var kinded interface{ DeadLetterKind() schema.DeadLetterKind }
			var invalid *schema.Invalid
			if !errors.As(err, &kinded) || !errors.As(err, &invalid) {
				t.Fatalf("error %v is not permanent", err)
			}
			if kinded.DeadLetterKind() != c.kind || invalid.Field != c.field || invalid.Reason == "" {
				t.Errorf("kind %q, field %q, reason %q; want %q and %q", kinded.DeadLetterKind(), invalid.Field, invalid.Reason,
					c.kind, c.field)
			}
			if rows, _, err := f.Plan(t.Context(), c.event, first(1)); rows < 1 || err != nil {
				t.Error("an event costs at least one row")
			}
		})
	}
}

func TestOtherErrorsMayBeTriedAgain(t *testing.T) {
	f := newFixture(t, monitor.Model{})
	f.recorder.err = errors.New("away")
	again := first(1)
	again.Delivered = 2
	for _, d := range []schema.Delivery{first(1), again} {
		err := f.Handle(t.Context(), event("1"), d)
		var kinded interface{ DeadLetterKind() schema.DeadLetterKind }
		if err == nil || errors.As(err, &kinded) {
			t.Errorf("error %v, want one that is not permanent", err)
		}
	}
	f.recorder.err = nil
	f.scorer.answer = func(scoring.Request) (scoring.Result, error) { return scoring.Result{}, scoring.ErrClosed }
	if err := f.Handle(t.Context(), event("1"), first(1)); !errors.Is(err, scoring.ErrClosed) {
		t.Errorf("error %v, want %v", err, scoring.ErrClosed)
	}
}

// A model of flow matching takes events of its own sampler, by our name and by diffusers'.
func TestSamplerOfAFlow(t *testing.T) {
	for name, fits := range map[string]bool{
		"flow_match": true, "FlowMatchEulerDiscreteScheduler": true, "ddim": false, "EulerDiscreteScheduler": false,
	} {
		f := newFixture(t, monitor.Model{Diffusion: scoring.Diffusion{Kind: "flow_match"}})
		ev := event("1")
		ev.Data.Sampler = &schema.Sampler{Name: name, Steps: 28, GuidanceScale: 5}
		if err := f.Handle(t.Context(), ev, first(1)); err != nil {
			t.Fatal(err)
		}
		deviations := f.recorder.order[0].Score.Receipt.Deviations
		if fits != (len(deviations) == 0) || !fits && !strings.Contains(deviations[0], "was replaced by flow_match") {
			t.Errorf("%s: deviations %q", name, deviations)
		}
	}
}

func TestWhatCannotBeRerunIsReplacedOrSkipped(t *testing.T) {
	sampled := func(name string, steps int) schema.Event {
		e := event("1")
		e.Data.Sampler = &schema.Sampler{Name: name, Steps: steps, GuidanceScale: 5}
		return e
	}
	noisy := event("1")
	noisy.Data.Noise = "jax"
	trailing := scoring.Diffusion{
		TrainTimesteps: 1000, BetaSchedule: "linear", BetaStart: 0.0001, BetaEnd: 0.02, Prediction: "epsilon",
		TimestepSpacing: "trailing",
	}
	half, index, third, last, whole := event("1"), 2, event("1"), 5, event("1")
	half.Data.NoiseDtype = "float16"
	third.Data.BatchIndex = &index
	whole.Data.BatchIndex, whole.Data.BatchSize = &index, 8
	sixth := event("1")
	sixth.Data.BatchIndex, sixth.Data.BatchSize = &last, 8
	plain := event("1")
	plain.Data.NoiseDtype = "float32"
	refuse := func(r scoring.Request) error {
		if r.Profile != (scoring.Profile{}) {
			if err := r.Profile.Validate(&ensemble.Manifest{Diffusion: trailing}); err != nil {
				return fmt.Errorf("%w: %w", scoring.ErrSettings, err)
			}
		}
		switch {
		case r.Noise == "jax":
			return fmt.Errorf("%w: jax", scoring.ErrNoise)
		case r.Draw.Dtype == "float16" || r.Draw.Batch.Index == 5:
			return fmt.Errorf("%w: draw %v", scoring.ErrNoise, r.Draw)
		case r.Profile.RequestRisk.Steps > 500:
			return fmt.Errorf("%w: 900 steps", scoring.ErrTooLarge)
		}
		return nil
	}
	for _, c := range []struct {
		name        string
		asRequested bool
		event       schema.Event
		steps       int // of the profile that ran; 0 is the fixed one
		deviation   string
		skip        schema.SkipReason
	}{
		{"another sampler", false, sampled("euler", 10), 0, "euler was replaced by ddim", schema.SkipSampler},
		{"settings of its own, fixed", false, sampled("ddim", 10), 0, "", ""},
		{"settings of its own, as requested", true, sampled("ddim", 10), 10, "", ""},
		{"no sampler, as requested", true, event("1"), 0, "fixed profile", schema.SkipSampler},
		{"a step too many, as requested", true, sampled("ddim", 61), 0, "trailing spacing has timestep -1",
			schema.SkipSettings},
		{"too large, as requested", true, sampled("ddim", 900), 0, "fixed profile", schema.SkipSettings},
		{"a sampler as diffusers names it", true, sampled("DDIMScheduler", 10), 10, "", ""},
		{"a sampler as CompVis names it", true, sampled("DDIMSampler", 10), 10, "", ""},
		{"a sampler as user interfaces name it", true, sampled("DDIM", 10), 10, "", ""},
		{"a sampler whose name begins like it", true, sampled("DDIMInverseScheduler", 10), 0,
			"DDIMInverseScheduler was replaced by ddim", schema.SkipSampler},
		{"a sampler with a space", false, sampled("DPM++ 2M SDE Karras", 10), 0, "DPM++ 2M SDE Karras was replaced by ddim",
			schema.SkipSampler},
		{"noise of another type", false, half, 0, "draw {float16", schema.SkipNoise},
		{"noise of the same type", false, plain, 0, "", ""},
		{"an image of a batch", false, third, 0, "image 2 of those drawn together cannot be drawn again", schema.SkipNoise},
		{"an image of a batch whose size is known", false, whole, 0, "", ""},
		{"an image of a batch that cannot be drawn", false, sixth, 0, "float32 drawn alone was used", schema.SkipNoise},
		{"noise", false, noisy, 0, "jax; the ensemble's own generator was used", schema.SkipNoise},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t, monitor.Model{AsRequested: c.asRequested, Diffusion: trailing})
			f.scorer.refuse = refuse
			if err := f.Handle(t.Context(), c.event, first(1)); err != nil {
				t.Fatal(err)
			}
			if got := f.scorer.requests[len(f.scorer.requests)-1].Profile.RequestRisk.Steps; got != c.steps {
				t.Errorf("ran %d steps, want %d", got, c.steps)
			}
			deviations := f.recorder.order[0].Score.Receipt.Deviations
			if (c.deviation == "") != (len(deviations) == 0) || len(deviations) > 0 && !strings.Contains(deviations[0],
				c.deviation) {
				t.Errorf("deviations %q, want %q", deviations, c.deviation)
			}
			if rows, _, err := f.Plan(t.Context(), c.event, first(1)); rows != 7 || err != nil {
				t.Errorf("rows %d, want 7", rows)
			}

			f = newFixture(t, monitor.Model{AsRequested: c.asRequested, Diffusion: trailing, SkipUnreproducible: true})
			f.scorer.refuse = refuse
			if err := f.Handle(t.Context(), c.event, first(1)); err != nil {
				t.Fatal(err)
			}
			skip := f.recorder.order[0].Skip
			if (c.skip == "") != (skip == nil) || skip != nil && (skip.Reason != c.skip || skip.Detail == "") {
				t.Errorf("skip %+v, want the reason %q", skip, c.skip)
			}
		})
	}
}

func TestDeadLettersOfUnknownModelsShareASeries(t *testing.T) {
	f := newFixture(t, monitor.Model{})
	for i, subject := range []string{"generation.requested.m", "generation.requested.x1", "generation.requested.x2"} {
		v := schema.Verdict{Delivery: first(uint64(i + 1)), DeadLetter: &schema.DeadLetter{Subject: subject,
			Kind: schema.KindUnknownModel, Reason: "r"}}
		if err := f.DeadLetter(t.Context(), v); err != nil {
			t.Fatal(err)
		}
	}
	families, err := f.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counted := map[string]float64{}
	for _, family := range families {
		if family.GetName() != "decuwatch_events_total" {
			continue
		}
		for _, m := range family.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["outcome"] == "dead_letter" && labels["reason"] == string(schema.KindUnknownModel) {
				counted[labels["model"]] = m.GetCounter().GetValue()
			}
		}
	}
	if len(counted) != 2 || counted["m"] != 1 || counted["unknown"] != 2 {
		t.Errorf("counted %v, want m 1 and unknown 2", counted)
	}
}

func TestAShareOfScoresWithoutAlertsIsSampled(t *testing.T) {
	f := newFixture(t, monitor.Model{})
	models := map[string]monitor.Model{"m": {Scorer: f.scorer, Classes: []string{"Trouser", "Bag"}, Profile: profile}}
	m, err := monitor.New(models, table{}, f.recorder, monitor.Config{SampleShare: 0.25,
		Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	sampled := 0
	for i := range 2000 {
		if err := handle(t.Context(), m, event(fmt.Sprint(i)), first(uint64(i+1))); err != nil {
			t.Fatal(err)
		}
		if f.recorder.order[i].Sampled {
			sampled++
		}
	}
	// The draw depends on the ids alone: this number never changes. It is within four standard deviations of 500.
	if sampled < 423 || sampled > 577 {
		t.Errorf("sampled %d of 2000, want about 500", sampled)
	}
}

func TestNewRequiresItsParts(t *testing.T) {
	if _, err := monitor.New(nil, nil, nil, monitor.Config{}); err == nil {
		t.Error("no error without models")
	}
}

package alerts_test

import (
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
)

const (
	digest   = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
	settings = "ddim/20/g2"
)

func ptr[T any](v T) *T { return &v }

// threshold is one of scope for the measurement; class below 0 means no class.
func threshold(
	id int64, scope schema.Scope, class int, measurement schema.MeasurementName, severity schema.Severity, value float64,
) schema.Threshold {
	th := schema.Threshold{
		ID: id, Model: "fashion-mnist", EnsembleDigest: digest, Settings: settings, Measurement: measurement,
		Scope: scope, Severity: severity, Value: value, Origin: "manual", SetBy: "test", SetAt: time.Unix(id, 0),
	}
	if class >= 0 {
		th.Class = &class
	}
	return th
}

// score is one of class 3 whose measurements have the given values, and mean distances a hundred times as high.
func score(gap, risk float64) schema.Score {
	return schema.Score{
		Event: schema.Event{
			Source: "//images.example.com/eu", ID: "r-17", Time: time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC),
			Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassIndex(3),
				Labels: map[string]string{"tenant": "a"}},
		},
		ClassIndex: 3, ClassLabel: "Dress",
		ClassGap:    schema.Measurement{Estimator: "paide-w2", Value: gap, UpperBound: math.Log(5), MeanDistance: 100 * gap},
		RequestRisk: &schema.Measurement{Estimator: "mean-w2", Value: risk, MeanDistance: 100 * risk},
		Receipt:     schema.Receipt{EnsembleDigest: digest, Settings: settings},
		ScoredAt:    time.Date(2026, 5, 4, 3, 2, 2, 0, time.UTC),
	}
}

func table(t *testing.T, ths ...schema.Threshold) *alerts.Table {
	t.Helper()
	table, err := alerts.NewTable(ths)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestDecide(t *testing.T) {
	const (
		gap, risk      = schema.ClassGap, schema.RequestRisk
		warn, critical = schema.SeverityWarn, schema.SeverityCritical
	)
	other := func(th schema.Threshold, change func(*schema.Threshold)) schema.Threshold { change(&th); return th }
	saturated := func(s schema.Score) schema.Score {
		s.ClassGap.Value, s.ClassGap.Saturated = s.ClassGap.UpperBound, true
		return s
	}
	type fires struct {
		severity           schema.Severity
		reason             schema.Reason
		decided, threshold float64
		id                 int64
	}
	for _, c := range []struct {
		name       string
		score      schema.Score
		thresholds []schema.Threshold
		gap, risk  *fires // nil is no alert
		reasons    [2]schema.Reason
		fallbacks  [2]alerts.Fallback
	}{
		{
			name: "no thresholds", score: score(1, 1),
			reasons: [2]schema.Reason{"no_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"missing", "missing"},
		},
		{
			name: "class below", score: score(.2, .2),
			thresholds: []schema.Threshold{threshold(1, "class", 3, gap, warn, .3), threshold(2, "model", -1, gap, warn, .1)},
			reasons:    [2]schema.Reason{"below_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "class reached exactly", score: score(.3, 0),
			thresholds: []schema.Threshold{threshold(1, "class", 3, gap, warn, .3)},
			gap:        &fires{warn, "class_threshold", .3, .3, 1},
			reasons:    [2]schema.Reason{"class_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "another class's threshold does not apply", score: score(.3, 0),
			thresholds: []schema.Threshold{threshold(1, "class", 4, gap, warn, .1)},
			reasons:    [2]schema.Reason{"no_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"missing", "missing"},
		},
		{
			name: "cluster if the class has none", score: score(.3, 0),
			thresholds: []schema.Threshold{threshold(1, "cluster", 3, gap, warn, .25), threshold(2, "model", -1, gap, warn, .1)},
			gap:        &fires{warn, "cluster_threshold", .3, .25, 1},
			reasons:    [2]schema.Reason{"cluster_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"cluster",
				"missing"},
		},
		{
			name: "model if neither has one", score: score(.3, .05),
			thresholds: []schema.Threshold{threshold(2, "model", -1, gap, warn, .1), threshold(3, "model", -1, risk, warn, .1)},
			gap:        &fires{warn, "model_threshold", .3, .1, 2},
			reasons:    [2]schema.Reason{"model_threshold", "below_threshold"}, fallbacks: [2]alerts.Fallback{"model", "model"},
		},
		{
			name: "the class's thresholds replace the model's, of every severity", score: score(.3, 0),
			thresholds: []schema.Threshold{threshold(1, "class", 3, gap, warn, .2),
				threshold(2, "model", -1, gap, critical, .1)},
			gap:     &fires{warn, "class_threshold", .3, .2, 1},
			reasons: [2]schema.Reason{"class_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "the highest severity makes one alert", score: score(.5, 0),
			thresholds: []schema.Threshold{threshold(2, "class", 3, gap, critical, .4), threshold(1, "class", 3, gap, warn, .2)},
			gap:        &fires{critical, "class_threshold", .5, .4, 2},
			reasons:    [2]schema.Reason{"class_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "a class does not hide behind its own threshold", score: score(.5, 0),
			thresholds: []schema.Threshold{threshold(1, "class", 3, gap, warn, .9),
				threshold(2, "limit", -1, gap, critical, .45)},
			gap:     &fires{critical, "absolute_limit", .5, .45, 2},
			reasons: [2]schema.Reason{"absolute_limit", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "the limit alone", score: score(.5, 0),
			thresholds: []schema.Threshold{threshold(2, "limit", -1, gap, warn, .45)},
			gap:        &fires{warn, "absolute_limit", .5, .45, 2},
			reasons:    [2]schema.Reason{"absolute_limit", "no_threshold"}, fallbacks: [2]alerts.Fallback{"missing", "missing"},
		},
		{
			name: "between equals the class is named, not the limit", score: score(.5, 0),
			thresholds: []schema.Threshold{threshold(1, "class", 3, gap, warn, .4), threshold(2, "limit", -1, gap, warn, .45)},
			gap:        &fires{warn, "class_threshold", .5, .4, 1},
			reasons:    [2]schema.Reason{"class_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "critical class over warning limit", score: score(.5, 0),
			thresholds: []schema.Threshold{threshold(1, "class", 3, gap, critical, .4),
				threshold(2, "limit", -1, gap, warn, .3)},
			gap:     &fires{critical, "class_threshold", .5, .4, 1},
			reasons: [2]schema.Reason{"class_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "thresholds of another ensemble do not apply", score: score(.5, .5),
			thresholds: []schema.Threshold{
				other(threshold(1, "class", 3, gap, warn, .1), func(th *schema.Threshold) {
					th.EnsembleDigest = strings.Repeat("0",
						64)
				}),
				other(threshold(2, "model", -1, risk, warn, .1), func(th *schema.Threshold) { th.Settings = "ddim/50/g2" }),
				other(threshold(3, "model", -1, gap, warn, .1), func(th *schema.Threshold) { th.Model = "cifar" }),
			},
			reasons: [2]schema.Reason{"stale_threshold", "stale_threshold"}, fallbacks: [2]alerts.Fallback{"stale", "stale"},
		},
		{
			name: "two alerts, one for each measurement", score: score(.5, .6),
			thresholds: []schema.Threshold{threshold(1, "class", 3, gap, warn, .1),
				threshold(2, "class", 3, risk, critical, .2)},
			gap:     &fires{warn, "class_threshold", .5, .1, 1},
			risk:    &fires{critical, "class_threshold", .6, .2, 2},
			reasons: [2]schema.Reason{"class_threshold", "class_threshold"},
		},
		{
			name: "saturated below the distance", score: saturated(score(.5, 0)), // mean distance 50
			thresholds: []schema.Threshold{other(threshold(1, "class", 3, gap, warn, .1),
				func(th *schema.Threshold) { th.Distance = ptr(51.) })},
			reasons: [2]schema.Reason{"below_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "saturated above the distance", score: saturated(score(.5, 0)),
			thresholds: []schema.Threshold{other(threshold(1, "class", 3, gap, warn, .1),
				func(th *schema.Threshold) { th.Distance = ptr(49.) })},
			gap:     &fires{warn, "class_threshold", 50, 49, 1},
			reasons: [2]schema.Reason{"class_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "saturated without a distance fires", score: saturated(score(.5, 0)),
			thresholds: []schema.Threshold{threshold(1, "class", 3, gap, warn, 1.2)},
			gap:        &fires{warn, "class_threshold", math.Log(5), 1.2, 1},
			reasons:    [2]schema.Reason{"class_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "the distance does not decide if nothing is saturated", score: score(.05, 0),
			thresholds: []schema.Threshold{other(threshold(1, "class", 3, gap, warn, .1),
				func(th *schema.Threshold) { th.Distance = ptr(1.) })},
			reasons: [2]schema.Reason{"below_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
		{
			name: "a withdrawn threshold is gone", score: score(.5, 0),
			thresholds: []schema.Threshold{
				other(threshold(8, "class", 3, gap, warn, .1), func(th *schema.Threshold) { th.Withdrawn = true }),
				threshold(7, "class", 3, gap, warn, .1), threshold(6, "model", -1, gap, warn, .2),
			},
			gap:     &fires{warn, "model_threshold", .5, .2, 6},
			reasons: [2]schema.Reason{"model_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"model", "missing"},
		},
		{
			name: "the newer of two of one scope and severity stands", score: score(.5, 0),
			thresholds: []schema.Threshold{threshold(8, "class", 3, gap, warn, .6), threshold(7, "class", 3, gap, warn, .1)},
			reasons:    [2]schema.Reason{"below_threshold", "no_threshold"}, fallbacks: [2]alerts.Fallback{"", "missing"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := alerts.Decide(c.score, table(t, c.thresholds...))
			if again := alerts.Decide(c.score, table(t, c.thresholds...)); !reflect.DeepEqual(d, again) {
				t.Errorf("decided twice: %+v, then %+v", d, again)
			}
			got := map[schema.MeasurementName]*fires{}
			for _, a := range d.Alerts {
				if got[a.Measurement] != nil {
					t.Errorf("two alerts on %s", a.Measurement)
				}
				got[a.Measurement] = &fires{a.Severity, a.Reason, a.Decided, a.Threshold, a.ThresholdID}
			}
			for i, want := range []*fires{c.gap, c.risk} {
				name := []schema.MeasurementName{gap, risk}[i]
				if !reflect.DeepEqual(got[name], want) {
					t.Errorf("%s: alert is %+v, want %+v", name, got[name], want)
				}
				f := d.Findings[i]
				severity := schema.Severity("")
				if want != nil {
					severity = want.severity
				}
				if f.Measurement != name || f.Reason != c.reasons[i] || f.Fallback != c.fallbacks[i] || f.Severity != severity {
					t.Errorf("%s: finding is %+v, want reason %s, fallback %q, severity %q", name, f, c.reasons[i], c.fallbacks[i],
						severity)
				}
			}
		})
	}
}

func TestDecideWithoutTable(t *testing.T) {
	d := alerts.Decide(score(9, 9), nil)
	if len(d.Alerts) != 0 || len(d.Findings) != 2 || d.Findings[0].Reason != schema.ReasonNone {
		t.Errorf("decision is %+v", d)
	}
}

// An alert carries everything of its score that a reviewer needs, and an id that depends on what it is about only.
func TestAlertCarriesItsScore(t *testing.T) {
	s := score(.5, .6)
	a := alerts.Decide(s, table(t, threshold(1, "class", 3, schema.ClassGap, "warn", .1))).Alerts[0]
	want := schema.Alert{
		ID: alerts.ID(s.Event.Source, "r-17", digest,
			"class_gap"), Kind: "score", Source: s.Event.Source, EventID: "r-17", EventTime: s.Event.Time,
		Model: "fashion-mnist", ClassIndex: 3, ClassLabel: "Dress", Labels: map[string]string{"tenant": "a"},
		Severity: "warn",
		Reason:   "class_threshold", Measurement: "class_gap", Value: .5, Decided: .5, Threshold: .1, ThresholdID: 1,
		ClassGap: .5, RequestRisk: new(.6), Receipt: s.Receipt, FiredAt: s.ScoredAt,
	}
	if !reflect.DeepEqual(a, want) {
		t.Errorf("alert is\n%+v\nwant\n%+v", a, want)
	}
	seen := map[string]bool{a.ID: true}
	for _, id := range []string{
		alerts.ID("x", "r-17", digest, "class_gap"), alerts.ID(s.Event.Source, "r-18", digest, "class_gap"),
		alerts.ID(s.Event.Source, "r-17", "0", "class_gap"), alerts.ID(s.Event.Source, "r-17", digest, "request_risk"),
	} {
		if seen[id] || len(id) != 32 {
			t.Errorf("id %q is another's, or not 32 digits", id)
		}
		seen[id] = true
	}
}

func TestTableRefuses(t *testing.T) {
	good := threshold(1, "class", 3, schema.ClassGap, "warn", .1)
	for _, c := range []struct {
		names  string
		change func(*schema.Threshold)
	}{
		{"scope", func(th *schema.Threshold) { th.Scope = "tenant" }},
		{"measurement", func(th *schema.Threshold) { th.Measurement = "kl" }},
		{"severity", func(th *schema.Threshold) { th.Severity = "info" }},
		{"value", func(th *schema.Threshold) { th.Value = math.NaN() }},
		{"distance", func(th *schema.Threshold) { th.Distance = ptr(math.Inf(1)) }},
		{"class", func(th *schema.Threshold) { th.Class = nil }},
		{"class", func(th *schema.Threshold) { th.Scope = "model" }},
		{"class -1", func(th *schema.Threshold) { th.Class = ptr(-1) }},
	} {
		th := good
		c.change(&th)
		if _, err := alerts.NewTable([]schema.Threshold{th}); err == nil || !strings.Contains(err.Error(), c.names) ||
			!strings.Contains(err.Error(), "threshold 1 of model fashion-mnist") {
			t.Errorf("error is %v, want one that names %s", err, c.names)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, classes := range []int{10, 100, 1000, 10_000} {
		var ths []schema.Threshold
		for i := range classes {
			ths = append(ths, threshold(int64(2*i), "class", i, schema.ClassGap, "warn", .1),
				threshold(int64(2*i+1), "class", i, schema.RequestRisk, "warn", .1))
		}
		table, err := alerts.NewTable(ths)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("classes-%d", classes), func(b *testing.B) {
			s := score(.05, .05)
			for b.Loop() {
				alerts.Decide(s, table)
			}
		})
	}
}

func ExampleDecide() {
	class := 3
	thresholds, err := alerts.NewTable([]schema.Threshold{
		{ID: 1, Model: "fashion-mnist", Measurement: schema.ClassGap, Scope: schema.ScopeClass, Class: &class,
			Severity: schema.SeverityWarn, Value: 0.2},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	d := alerts.Decide(schema.Score{
		Event: schema.Event{
			Source: "//images.example.com", ID: "r-17", Data: schema.Generation{Model: "fashion-mnist"},
		},
		ClassIndex:  3,
		ClassGap:    schema.Measurement{Value: 0.31},
		RequestRisk: &schema.Measurement{Value: 0.02},
	}, thresholds)
	for _, f := range d.Findings {
		fmt.Println(f.Measurement, f.Reason, f.Severity)
	}
	// Output:
	// class_gap class_threshold warn
	// request_risk no_threshold
}

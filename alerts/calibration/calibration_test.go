package calibration

import (
	"errors"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
)

func normal(r *rand.Rand, class, n int, mean float64) []schema.Sample {
	samples := make([]schema.Sample, n)
	for i := range samples {
		samples[i] = schema.Sample{Class: class, Value: mean + r.NormFloat64(), Distance: r.Float64()}
	}
	return samples
}

// alert reports whether a bound alerts on a sample, as alerts.Decide does.
func (b Bound) alert(s schema.Sample) bool {
	if s.Saturated && b.Distance != nil {
		return s.Distance >= *b.Distance
	}
	return s.Value >= b.Value
}

// pvalue returns the conformal p-value of s among reference samples, (1 + #{reference >= s}) / (n + 1): if s is
// exchangeable with the reference, the chance that it is at most alpha is at most alpha, whatever the distribution.
//
// Reference: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", Springer 2005, chapter 2;
// for outlier detection S. Bates et al., "Testing for outliers with conformal p-values", Annals of Statistics 2023.
func pvalue(reference []schema.Sample, s schema.Sample) float64 {
	n := 0
	for _, r := range reference {
		if compare(r, s) >= 0 {
			n++
		}
	}
	return float64(1+n) / float64(len(reference)+1)
}

func TestPValue(t *testing.T) {
	reference := []schema.Sample{{Value: 1}, {Value: 2}, {Value: 2}, {Value: 3}}
	for _, c := range []struct {
		value, want float64
	}{{0, 1}, {2, 4.0 / 5}, {2.5, 2.0 / 5}, {3, 2.0 / 5}, {4, 1.0 / 5}} {
		if got := pvalue(reference, schema.Sample{Value: c.value}); got != c.want {
			t.Errorf("p(%g) = %g, want %g", c.value, got, c.want)
		}
	}
}

func TestNeeded(t *testing.T) {
	for alpha, want := range map[float64]int{0.5: 1, 0.1: 9, 0.05: 19, 0.01: 99, 0.005: 199, 0.001: 999} {
		if got := Needed(alpha); got != want {
			t.Errorf("Needed(%g) = %d, want %d", alpha, got, want)
		}
	}
}

// A sample alerts exactly if its p-value is at most alpha.
func TestFindAgreesWithPValue(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for trial := range 300 {
		n := 1 + r.IntN(250)
		alpha := []float64{0.5, 0.1, 0.05, 0.013, 0.01}[trial%5]
		draw := func() schema.Sample {
			s := schema.Sample{Value: math.Round(r.NormFloat64()*4) / 4, Distance: math.Round(r.ExpFloat64()*8) / 8} // with ties
			if r.Float64() < 0.1*float64(trial%4) {
				s.Saturated, s.Value = true, 5
			}
			return s
		}
		reference := make([]schema.Sample, n)
		for i := range reference {
			reference[i] = draw()
		}
		bound, ok := Find(slices.Clone(reference), alpha)
		if ok != (n >= Needed(alpha)) {
			t.Fatalf("n = %d, alpha = %g: found %t", n, alpha, ok)
		}
		if !ok {
			continue
		}
		if bound.Achieved > alpha || bound.N != n {
			t.Fatalf("n = %d, alpha = %g: %+v", n, alpha, bound)
		}
		for range 200 {
			s := draw()
			if p := pvalue(reference, s); bound.alert(s) != (p <= alpha+1e-9) {
				t.Fatalf("n = %d, alpha = %g: p of %+v is %g, the bound is %+v", n, alpha, s, p, bound)
			}
		}
	}
}

// TestFalseAlarmRate calibrates 400 times and decides on fresh scores of the same distribution: the mean rate of alerts
// is at most alpha, and close to the rate that is claimed.
func TestFalseAlarmRate(t *testing.T) {
	const trials, fresh = 400, 500
	r := rand.New(rand.NewPCG(3, 4))
	for _, alpha := range []float64{0.1, 0.02} {
		alarms, claimed := 0, 0.0
		for range trials {
			bound, ok := Find(normal(r, 0, 120, 0), alpha)
			if !ok {
				t.Fatal("not found")
			}
			claimed += bound.Achieved / trials
			for _, s := range normal(r, 0, fresh, 0) {
				if bound.alert(s) {
					alarms++
				}
			}
		}
		rate := float64(alarms) / (trials * fresh)
		// The rate of one trial is Beta distributed with a deviation of about sqrt(alpha / 120); the mean of 400 has a
		// twentieth of it. Five deviations: the generator's seed is fixed in any case.
		if slack := 5 * math.Sqrt(alpha/120/trials); rate > alpha+slack || math.Abs(rate-claimed) > slack {
			t.Errorf("alpha %g: %.4f of fresh scores alert, %.4f were claimed", alpha, rate, claimed)
		}
	}
}

func TestClusters(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	samples := map[int][]schema.Sample{}
	for class, mean := range []float64{0, 10, 0, 10, 0, 30} {
		samples[class] = normal(r, class, 60, mean)
	}
	samples[6] = normal(r, 6, minimal-1, 0)
	got := Clusters(samples)
	want := map[int][]int{0: {0, 2, 4}, 2: {0, 2, 4}, 4: {0, 2, 4}, 1: {1, 3}, 3: {1, 3}, 5: {5}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestCalibrate(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	var samples []schema.Sample
	samples = append(samples, normal(r, 0, 150, 0)...)  // enough by itself
	samples = append(samples, normal(r, 1, 60, 20)...)  // enough together with class 2
	samples = append(samples, normal(r, 2, 60, 20)...)  //
	samples = append(samples, normal(r, 3, 30, 500)...) // alone, too few: the model's
	results, err := Calibrate(samples, Options{Alpha: 0.01, Classes: 5, WellSampled: []int{0, 1, 2}})
	if err != nil {
		t.Fatal(err)
	}
	var got []Result
	for _, res := range results {
		if res.N == 0 || res.Achieved > 0.01 || math.IsNaN(res.Value) {
			t.Errorf("%+v", res)
		}
		got = append(got, Result{Scope: res.Scope, Class: res.Class, Cluster: res.Cluster, Own: res.Own,
			Bound: Bound{N: res.N}})
	}
	want := []Result{
		{Scope: schema.ScopeModel, Class: -1, Own: 270, Bound: Bound{N: 270}},
		{Scope: schema.ScopeClass, Class: 0, Own: 150, Bound: Bound{N: 150}},
		{Scope: schema.ScopeCluster, Class: 1, Cluster: []int{1, 2}, Own: 60, Bound: Bound{N: 120}},
		{Scope: schema.ScopeCluster, Class: 2, Cluster: []int{1, 2}, Own: 60, Bound: Bound{N: 120}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
	if results[0].Value > 100 {
		t.Errorf("the poorly sampled class raised the model's threshold to %g", results[0].Value)
	}
	var few *TooFewError
	if _, err := Calibrate(samples, Options{Alpha: 0.001, Classes: 5}); !errors.As(err, &few) || few.Needed != 999 ||
		few.Given != 300 {
		t.Errorf("alpha 0.001: %v", err)
	}
	for _, alpha := range []float64{0, 1, -1, 2, math.NaN()} {
		if _, err := Calibrate(samples, Options{Alpha: alpha, Classes: 5}); err == nil {
			t.Errorf("alpha %g was taken", alpha)
		}
	}
	if _, err := Calibrate(samples, Options{Alpha: 0.1, Classes: 2}); err == nil {
		t.Error("a class beyond the model's was taken")
	}
	if _, err := Calibrate(nil, Options{Alpha: 0.1, Classes: 2}); !errors.As(err, &few) || few.Given != 0 {
		t.Errorf("no scores: %v", err)
	}
}

func TestCount(t *testing.T) {
	k := Key{
		Series:      schema.Series{Model: "m", EnsembleDigest: "d", Settings: "s"},
		Measurement: schema.RequestRisk, Severity: schema.SeverityWarn,
	}
	model := schema.Threshold{
		ID: 1, Model: "m", EnsembleDigest: "d", Settings: "s", Measurement: schema.RequestRisk, Severity: schema.SeverityWarn,
		Scope: schema.ScopeModel, Value: 2,
	}
	class := model
	class.ID, class.Scope, class.Class, class.Value = 2, schema.ScopeClass, new(1), 3
	table, err := alerts.NewTable([]schema.Threshold{model, class})
	if err != nil {
		t.Fatal(err)
	}
	samples := []schema.Sample{
		{Class: 0, Value: 1}, {Class: 0, Value: 2}, {Class: 1, Value: 2}, {Class: 1, Value: 3}, {Class: 1, Value: 4},
	}
	if got := Count(samples, k, table); !reflect.DeepEqual(got, map[int]int{0: 1, 1: 2}) {
		t.Errorf("%v", got)
	}
}

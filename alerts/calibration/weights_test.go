package calibration

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/schema"
)

// traffic draws n requests of one class: one in ten comes from a part of the traffic with higher scores, and is scored
// with probability rare; the others are scored with probability common. It returns what was scored.
func traffic(r *rand.Rand, n int, common, rare float64) (scored []schema.Sample) {
	for range n {
		s, p := schema.Sample{Value: r.NormFloat64()}, common
		if r.Float64() < 0.1 {
			s.Value, p = s.Value+2, rare
		}
		if r.Float64() < p {
			s.Weight = 1 / p
			scored = append(scored, s)
		}
	}
	return scored
}

// The false-alarm rate holds for the traffic, not for what was scored of it.
func TestFalseAlarmRateOfSampledTraffic(t *testing.T) {
	const trials, alpha = 300, 0.05
	r := rand.New(rand.NewPCG(7, 8))
	rate := func(weighed bool, common, rare float64) float64 {
		alarms, all := 0, 0
		for range trials {
			reference := traffic(r, 2000, common, rare)
			if !weighed {
				for i := range reference {
					reference[i].Weight = 0
				}
			}
			bound, ok := Find(reference, alpha)
			if !ok {
				t.Fatal("not found")
			}
			for _, s := range traffic(r, 300, 1, 1) {
				if all++; bound.alert(s) {
					alarms++
				}
			}
		}
		return float64(alarms) / float64(all)
	}
	for _, c := range []struct{ common, rare float64 }{{1, 0.1}, {0.1, 1}, {0.3, 0.3}} {
		if got := rate(true, c.common, c.rare); got > alpha+0.003 || got < alpha-0.02 {
			t.Errorf("shares %g and %g: the false-alarm rate of the traffic is %.4f, want %g", c.common, c.rare, got, alpha)
		}
	}
	if got := rate(false, 1, 0.1); got < alpha+0.02 {
		t.Errorf("without weights the rate is %.4f: the test shows nothing", got)
	}
}

// A weighed sample alerts exactly if its weighed p-value is at most alpha.
func TestFindAgreesWithWeighedPValue(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	found := 0
	for trial := range 300 {
		alpha := []float64{0.5, 0.1, 0.05, 0.013}[trial%4]
		draw := func() schema.Sample {
			s := schema.Sample{Value: math.Round(r.NormFloat64()*4) / 4, Weight: []float64{1, 2, 4}[r.IntN(3)]}
			if trial%3 == 0 && r.Float64() < 0.1 {
				s.Saturated, s.Value, s.Distance = true, 5, math.Round(r.ExpFloat64()*8)/8
			}
			return s
		}
		reference := make([]schema.Sample, 1+r.IntN(250))
		for i := range reference {
			reference[i] = draw()
		}
		total, most := requests(reference)
		bound, ok := Find(slices.Clone(reference), alpha)
		if ok != (most/(total+most) <= alpha+1e-9) {
			t.Fatalf("%d samples that weigh %g, alpha %g: found %t", len(reference), total, alpha, ok)
		}
		if !ok {
			continue
		}
		found++
		if bound.Achieved > alpha+1e-9 || bound.N != len(reference) {
			t.Fatalf("alpha %g: %+v", alpha, bound)
		}
		for range 100 {
			s := draw()
			p := most
			for _, x := range reference {
				if compare(x, s) >= 0 {
					p += x.Requests()
				}
			}
			if p /= total + most; bound.alert(s) != (p <= alpha+1e-9) {
				t.Fatalf("alpha %g: p of %+v is %g, the bound is %+v", alpha, s, p, bound)
			}
		}
	}
	if found < 100 {
		t.Errorf("only %d trials found a bound", found)
	}
}

// Equal weights change nothing, whatever they are.
func TestEqualWeightsChangeNothing(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	var plain []schema.Sample
	for class := range 6 {
		plain = append(plain, normal(r, class, 40+class, float64(class/2))...)
	}
	weighed := slices.Clone(plain)
	for i := range weighed {
		weighed[i].Weight = 8
	}
	o := Options{Alpha: 0.02, Classes: 6}
	a, err := Calibrate(plain, o)
	b, err2 := Calibrate(weighed, o)
	if err != nil || err2 != nil || len(a) != len(b) || len(a) < 3 {
		t.Fatalf("%d and %d results, %v, %v", len(a), len(b), err, err2)
	}
	for i := range a {
		if a[i].Value != b[i].Value || a[i].N != b[i].N || math.Abs(a[i].Achieved-b[i].Achieved) > 1e-12 ||
			!slices.Equal(a[i].Cluster, b[i].Cluster) {
			t.Errorf("result %d is %+v, with weights %+v", i, a[i], b[i])
		}
	}
}

// A few scores that stand for very much are worth few: the error says so.
func TestUnequalWeightsAreWorthLess(t *testing.T) {
	samples := normal(rand.New(rand.NewPCG(13, 14)), 0, 100, 0)
	if _, err := Calibrate(samples, Options{Alpha: 0.01, Classes: 1}); err != nil {
		t.Fatal(err)
	}
	samples[0].Weight = 100
	_, err := Calibrate(samples, Options{Alpha: 0.01, Classes: 1})
	var few *TooFewError
	if !errors.As(err, &few) || few.Given != 1 || few.Stored != 100 ||
		!strings.Contains(err.Error(), "the 100 that are there are worth 1, because they were sampled with unequal shares") {
		t.Errorf("error is %v", err)
	}
}

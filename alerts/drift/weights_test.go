package drift

import (
	"math"
	"math/rand/v2"
	"testing"
)

// A weighed reference has the p-values of one in which each sample is there as often as it weighs.
func TestWeighedReference(t *testing.T) {
	r := NewReference([]float64{3, 1, 2}, []float64{1, 2, 3})
	for x, want := range map[float64]float64{0: 1, 1: 1, 1.5: 7.0 / 9, 2: 7.0 / 9, 2.5: 4.0 / 9, 3: 4.0 / 9, 4: 3.0 / 9} {
		if got := r.PValue(x); math.Abs(got-want) > 1e-12 {
			t.Errorf("p(%g) = %g, want %g", x, got, want)
		}
	}
}

// Requests with higher scores are scored twenty times as often. The p-values of the traffic are uniform, those of what
// is scored are not: weighed, there is still no more than one false alarm in the run length.
func TestRunLengthOfSampledTraffic(t *testing.T) {
	const wanted, runs, most = 100.0, 400, 1000
	r := rand.New(rand.NewPCG(3, 4))
	alarms := func(weighed bool) (n int) {
		for range runs {
			var p, weights []float64
			for len(p) < most {
				u, share := 1-r.Float64(), 0.05
				if u < 0.1 {
					share = 1
				}
				if r.Float64() < share {
					p, weights = append(p, u), append(weights, 1/share)
				}
			}
			if !weighed {
				weights = nil
			}
			if rise, alarm := Scan(p, weights, wanted); alarm && float64(rise.At) < wanted/10 {
				n++ // within a tenth of the run length
			}
		}
		return n
	}
	if n := alarms(true); n > runs/10+4*7 {
		t.Errorf("%d of %d runs had a false alarm in a tenth of the run length", n, runs)
	}
	if n := alarms(false); n < runs/3 {
		t.Errorf("without weights there were %d false alarms: the test shows nothing", n)
	}
	// Equal weights change nothing.
	p := []float64{0.5, 0.01, 0.3, 0.01, 0.01, 0.02}
	a, alarm := Scan(p, nil, 100)
	if b, again := Scan(p, []float64{4, 4, 4, 4, 4, 4}, 100); a != b || alarm != again || !alarm {
		t.Errorf("%+v, with equal weights %+v", a, b)
	}
}

package drift

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

func TestPValue(t *testing.T) {
	r := NewReference([]float64{3, 1, 2, 2}, nil)
	for x, want := range map[float64]float64{0: 1, 1: 1, 2: 4.0 / 5, 2.5: 2.0 / 5, 3: 2.0 / 5, 4: 1.0 / 5} {
		if got := r.PValue(x); got != want {
			t.Errorf("p(%g) = %g, want %g", x, got, want)
		}
	}
	if p := (Reference{}).PValue(1e9); p != 1 {
		t.Errorf("p of an empty reference is %g", p)
	}
}

// TestQuantilesAreConservative holds p-values by quantiles against those by the samples.
func TestQuantilesAreConservative(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		n := 20 + r.IntN(500)
		samples := make([]float64, n)
		for i := range samples {
			samples[i] = math.Round(r.ExpFloat64()*10) / 10
		}
		all := NewReference(samples, nil)
		quantiles := map[string]float64{}
		for _, q := range []float64{0.5, 0.9, 0.99} {
			quantiles[fmt.Sprint(q)] = all.sorted[min(n-1, int(q*float64(n)))]
		}
		few, err := Quantiles(n, quantiles)
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			x := math.Round(r.ExpFloat64()*10)/10 + 0.05
			if few.PValue(x) < all.PValue(x)-1e-12 {
				t.Fatalf("n = %d: p(%g) = %g by quantiles, %g by samples", n, x, few.PValue(x), all.PValue(x))
			}
		}
	}
	for _, bad := range []map[string]float64{
		{"0": 1}, {"1": 1}, {"NaN": 1}, {"half": 1}, {"0.5": 2, "0.9": 1}, {"0.5": math.NaN()},
	} {
		if _, err := Quantiles(10, bad); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
}

// TestBetIsFair integrates the bet over uniform p: by substitution p = e^-t, in steps of the trapezoidal rule. What
// lies beyond t = 4000 is (1 - p) e^-t / (p t^2) dt = 1/t^2 dt, one in 4000.
func TestBetIsFair(t *testing.T) {
	const end, step = 4000.0, 1e-3
	sum := 0.0
	for x := step / 2; x < end; x += step {
		if x < 700 {
			p := math.Exp(-x)
			sum += Bet(p) * p * step
		} else {
			sum += step / (x * x)
		}
	}
	if math.Abs(sum-1) > 1e-3 {
		t.Errorf("the mean bet is %g, want 1", sum)
	}
	if got := Bet(1 - 1e-9); math.Abs(got-Bet(1)) > 1e-6 {
		t.Errorf("a jump at 1: %g", got)
	}
	if a, b := Bet(1-0.99e-4), Bet(1-1.01e-4); math.Abs(a-b) > 1e-5 {
		t.Errorf("a jump where the series takes over: %g, %g", a, b)
	}
}

// TestRunLength measures the mean run length without a change and the delay after one.
func TestRunLength(t *testing.T) {
	const wanted = 500.0
	r := rand.New(rand.NewPCG(2, 2))
	run := func(draw func() float64, most int) int {
		value := 0.0
		for i := range most {
			value = (1 + value) * Bet(draw())
			if value >= wanted {
				return i + 1
			}
		}
		return most
	}
	uniform := func() float64 { return 1 - r.Float64() }
	total := 0
	for range 300 {
		total += run(uniform, 20_000)
	}
	if mean := float64(total) / 300; mean < wanted {
		t.Errorf("a false alarm after %g observations on average, at least %g are stated", mean, wanted)
	}
	// Scores that would be among the highest tenth of the reference are noticed soon.
	total = 0
	for range 300 {
		total += run(func() float64 { return 0.1 * uniform() }, 20_000)
	}
	if mean := float64(total) / 300; mean > 20 {
		t.Errorf("a rise is noticed after %g observations on average", mean)
	}
}

func TestScan(t *testing.T) {
	low := []float64{0.9, 0.5, 0.7, 0.8}
	if _, alarm := Scan(low, nil, 100); alarm {
		t.Error("an alarm without a rise")
	}
	rise, alarm := Scan(append(low, 0.01, 0.01, 0.01, 0.01, 0.01), nil, 100)
	if !alarm || rise.At < 5 || rise.At > 7 || rise.Evidence < 100 {
		t.Errorf("%+v %t", rise, alarm)
	}
	if _, alarm := Scan(nil, nil, 100); alarm {
		t.Error("an alarm on nothing")
	}
}

package evaluation

import (
	"math/rand/v2"
	"strings"
	"testing"

	"gonum.org/v1/gonum/floats"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// The wanted values are those of scipy 1.17.1's betabinom and numpy's convolve.
func TestBetaBinomial(t *testing.T) {
	for _, c := range []struct {
		n         int
		a, b      float64
		want      [3]float64 // chances of 0, 1 and 3
		low, high int
	}{
		{8, 1, 20, [3]float64{0.714285714285714, 0.21164021164021157, 0.013675213675213687}, 0, 2},
		{50, 5, 95, [3]float64{0.12506669296542286, 0.21712967528719257, 0.1760476201087526}, 0, 7},
		{300, 15, 286, [3]float64{2.55069448921508e-05, 0.0001962072684011633, 0.0023277631875299135}, 6, 27},
	} {
		p := betaBinomial(c.n, c.a, c.b)
		for i, k := range []int{0, 1, 3} {
			if !(p[k] > c.want[i]*(1-1e-9) && p[k] < c.want[i]*(1+1e-9)) {
				t.Errorf("chance of %d of %d is %v, want %v", k, c.n, p[k], c.want[i])
			}
		}
		closeTo(t, "sum", floats.Sum(p), 1)
		if low, high := quantile(p, 0.025), quantile(p, 0.975); low != c.low || high != c.high {
			t.Errorf("%d tries give %d to %d, want %d to %d", c.n, low, high, c.low, c.high)
		}
	}
	sum := convolved(betaBinomial(8, 1, 20), betaBinomial(3, 2, 5))
	for k, want := range []float64{0.2976190476190475, 0.3432854623330813, 0.22687850068802448, 0.097854526425955} {
		closeTo(t, "sum of two counts", sum[k], want)
	}
	if len(sum) != 12 || quantile(sum, 0.975) != 4 {
		t.Errorf("the sum has %d chances and reaches %d", len(sum), quantile(sum, 0.975))
	}
}

// A rate is added up over thresholds: 1 of 19 scores above the first, 5 of 99 above the second.
func TestAlarmRate(t *testing.T) {
	var r AlarmRate
	r.add(alarms{scores: 8, alerts: 1, n: 20, achieved: 1. / 21})
	if r.Scores != 8 || r.Alerts != 1 || r.Low != 0 || r.High != 2 {
		t.Errorf("rate is %+v", r)
	}
	r.add(alarms{scores: 50, alerts: 4, n: 99, achieved: 5. / 100})
	closeTo(t, "expected", r.Expected, 8./21+50*0.05)
	if r.Scores != 58 || r.Alerts != 5 || r.High <= 7 {
		t.Errorf("rate is %+v", r)
	}
}

// alarmEnsemble has two well-sampled classes and a rare one.
func alarmEnsemble() *ensemble.Ensemble {
	return &ensemble.Ensemble{Digest: "d", Manifest: ensemble.Manifest{Name: "m", Classes: []ensemble.Class{
		{Label: "a", Images: []int{100, 100}}, {Label: "b", Images: []int{100, 100}}, {Label: "rare", Images: []int{1, 1}},
	}}}
}

// Exchangeable scores alert within the range in 95% of evaluations, and the alerts of a rare class are not false.
func TestFalseAlarms(t *testing.T) {
	const trials = 300
	e, r := alarmEnsemble(), rand.New(rand.NewPCG(1, 2))
	draw := func(n int) []schema.Sample {
		var samples []schema.Sample
		for i := range n {
			samples = append(samples, schema.Sample{Class: i % 2, Value: r.NormFloat64()})
		}
		return append(samples, schema.Sample{Class: 2, Value: 1000})
	}
	within := 0
	for range trials {
		f := newFalseAlarms(schema.RequestRisk, 0.05, e.Labels())
		if err := f.count(e, "s", draw(60), draw(60)); err != nil {
			t.Fatal(err)
		}
		if f.Reason != "" || f.All.Scores != 60 || f.All.Alerts != f.Classes[0].Alerts+f.Classes[1].Alerts ||
			f.Classes[0].Scores != 30 || f.Classes[2].Scores != 0 || f.Classes[2].Alerts != 0 {
			t.Fatalf("counts are %+v", f)
		}
		if f.All.Low <= f.All.Alerts && f.All.Alerts <= f.All.High {
			within++
		}
	}
	// The range holds at least 95% (counts are whole numbers): 285 of 300, less four deviations of a binomial.
	if within < 270 {
		t.Errorf("%d of %d evaluations lie within the range", within, trials)
	}
}

func TestFalseAlarmsOfTooFewScores(t *testing.T) {
	f := newFalseAlarms(schema.ClassGap, 0.05, alarmEnsemble().Labels())
	if err := f.count(alarmEnsemble(), "s", []schema.Sample{{Class: 0, Value: 1}}, nil); err != nil ||
		!strings.Contains(f.Reason, "takes 19 scores of well-sampled classes, 1 are") || f.All.Scores != 0 {
		t.Errorf("%+v, %v", f, err)
	}
	if err := f.count(alarmEnsemble(), "s", nil, nil); err != nil || f.Reason != "no class has a score" {
		t.Errorf("%+v, %v", f, err)
	}
}

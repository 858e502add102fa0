package evaluation

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/mathext"
	"gonum.org/v1/gonum/stat/combin"

	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// FalseAlarms says how often usual requests alert if thresholds are calibrated on one half of the requests and the
// alerts counted on the other half, by the code that calibrates and decides in production. Only classes whose own
// scores are in their threshold's sample count: alerts of other classes are what the product is for.
type FalseAlarms struct {
	Measurement schema.MeasurementName `json:"measurement"`
	Alpha       float64                `json:"alpha"` // the wanted rate
	All         AlarmRate              `json:"all"`
	Classes     []AlarmRate            `json:"classes"`
	Reason      string                 `json:"reason,omitempty"` // why nothing was calibrated in some rotation
}

// AlarmRate is the number of alerts on scores that no threshold was calibrated on.
type AlarmRate struct {
	Label  string `json:"label,omitempty"` // of the class
	Scores int    `json:"scores"`
	Alerts int    `json:"alerts"`
	// Expected alerts, and the range that holds the alerts of 95% of evaluations of this size if calibrated and counted
	// scores have one distribution: beta-binomial, from the numbers of both.
	Expected float64 `json:"expected"`
	Low      int     `json:"low"`
	High     int     `json:"high"`

	chances []float64 // of 0, 1, ... alerts
}

// alarms are the scores and alerts of a threshold that was calibrated on n other scores, at the rate that the
// calibration claims.
type alarms struct {
	scores, alerts, n int
	achieved          float64
}

// add counts the scores of one more threshold.
func (r *AlarmRate) add(a alarms) {
	// The rate of a conformal threshold is Beta distributed: k of n scores lie above it, and its mean is k+1 of n+1.
	above := math.Round(a.achieved * float64(a.n+1))
	if r.chances == nil {
		r.chances = []float64{1}
	}
	r.chances = convolved(r.chances, betaBinomial(a.scores, above, float64(a.n+1)-above))
	r.Scores, r.Alerts = r.Scores+a.scores, r.Alerts+a.alerts
	r.Expected += float64(a.scores) * a.achieved
	r.Low, r.High = quantile(r.chances, 0.025), quantile(r.chances, 0.975)
}

// betaBinomial returns the probabilities of 0 to n successes in n tries if the chance of a success is Beta(a, b)
// distributed. A and b must be positive.
func betaBinomial(n int, a, b float64) []float64 {
	p := make([]float64, n+1)
	for k := range p {
		p[k] = math.Exp(combin.LogGeneralizedBinomial(float64(n), float64(k)) +
			mathext.Lbeta(float64(k)+a, float64(n-k)+b) - mathext.Lbeta(a, b))
	}
	return p
}

// convolved returns the distribution of the sum of two independent counts.
func convolved(a, b []float64) []float64 {
	sum := make([]float64, len(a)+len(b)-1)
	for i := range a {
		for k := range b {
			sum[i+k] += a[i] * b[k]
		}
	}
	return sum
}

// quantile returns the least count up to which lies at least the share q.
func quantile(chances []float64, q float64) int {
	sum := 0.0
	for k, p := range chances {
		if sum += p; sum >= q {
			return k
		}
	}
	return len(chances) - 1
}

// newFalseAlarms returns the counts of no scores.
func newFalseAlarms(name schema.MeasurementName, alpha float64, labels []string) FalseAlarms {
	f := FalseAlarms{Measurement: name, Alpha: alpha, Classes: make([]AlarmRate, len(labels))}
	for i, label := range labels {
		f.Classes[i].Label = label
	}
	return f
}

// count calibrates thresholds of an ensemble on some samples and counts alerts on others.
func (f *FalseAlarms) count(e *ensemble.Ensemble, settings string, calibrate, count []schema.Sample) error {
	known := e.WellSampled()
	plan, err := calibration.NewPlan(calibration.Config{
		Key: calibration.Key{
			Series:      schema.Series{Model: e.Name, EnsembleDigest: e.Digest, Settings: settings},
			Measurement: f.Measurement, Severity: schema.SeverityWarn,
		},
		Alpha: f.Alpha, Labels: e.Labels(), WellSampled: known,
	}, calibrate, count, nil)
	var few *calibration.TooFewError
	switch {
	case len(calibrate) == 0:
		f.Reason = "no class has a score"
		return nil
	case errors.As(err, &few):
		f.Reason = fmt.Sprintf("%g takes %d scores of well-sampled classes, %d are there", few.Alpha, few.Needed, few.Given)
		return nil
	case err != nil:
		return err
	}
	scores := map[int]int{}
	for _, s := range count {
		scores[s.Class]++
	}
	type threshold struct {
		scope schema.Scope
		class int // the first to which it applies
	}
	shared, order := map[threshold]*alarms{}, []threshold{}
	for class, line := range plan.Classes[1:] { // the model is first
		a := alarms{scores[class], line.AlertsNew, line.N, line.Achieved}
		of := threshold{scope: line.NewScope}
		switch line.NewScope {
		case schema.ScopeClass:
			of.class = class
		case schema.ScopeCluster:
			of.class = line.Cluster[0]
		default:
			if !slices.Contains(known, class) {
				continue
			}
		}
		f.Classes[class].add(a)
		if shared[of] == nil {
			shared[of], order = &alarms{n: a.n, achieved: a.achieved}, append(order, of)
		}
		shared[of].scores, shared[of].alerts = shared[of].scores+a.scores, shared[of].alerts+a.alerts
	}
	for _, of := range order {
		f.All.add(*shared[of])
	}
	return nil
}

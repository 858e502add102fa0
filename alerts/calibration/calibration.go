// Package calibration finds thresholds with a known false-alarm rate from stored scores. It is pure: scores in,
// thresholds out.
package calibration

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/stat"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
)

// compare orders samples by how uncertain they are. Saturated samples, whose values are equal, come above all others,
// in the order of their distances.
func compare(a, b schema.Sample) int {
	switch {
	case a.Saturated && b.Saturated:
		return cmp.Compare(a.Distance, b.Distance)
	case a.Saturated:
		return 1
	case b.Saturated:
		return -1
	}
	return cmp.Compare(a.Value, b.Value)
}

// Needed returns how many reference samples a false-alarm rate needs: the least n with 1 / (n + 1) <= alpha.
// It panics unless 0 < alpha < 1.
func Needed(alpha float64) int {
	if !(alpha > 0 && alpha < 1) {
		panic(fmt.Sprintf("calibration: alpha is %g, must lie between 0 and 1", alpha))
	}
	return int(math.Ceil(1/alpha - 1 - 1e-9))
}

// Bound is the value at which an alert fires.
type Bound struct {
	Value    float64  // an unsaturated measurement at or above it alerts
	Distance *float64 // a saturated measurement whose distance is at or above it alerts; if nil, all of them do
	N        int      // reference samples
	Achieved float64  // p-value of the least uncertain measurement that alerts: the false-alarm rate that holds
}

// requests returns how many requests the samples stand for, and the most that one of them stands for.
func requests(samples []schema.Sample) (total, most float64) {
	for _, s := range samples {
		total += s.Requests()
		most = max(most, s.Requests())
	}
	return total, most
}

// effective returns how many samples of equal weight are worth as much: the number of samples, if all weights are
// equal.
func effective(samples []schema.Sample) int {
	total, most := requests(samples)
	if most == 0 {
		return 0
	}
	return int(total/most + 1e-9)
}

// Find returns the bound at which a sample alerts exactly if its conformal p-value is at most alpha. The second result
// is false if the reference has fewer than Needed(alpha) samples, or is worth fewer. The reference must be finite; it
// is sorted in place. Find panics unless 0 < alpha < 1.
//
// Samples of sampled traffic are weighed: with the weights w, the p-value of s is the sum of w over the reference at or
// above s, over the sum of all w. The request that is decided on counts in both sums with the greatest weight, so that
// the false-alarm rate holds for every request of the traffic.
//
// Reference: R. J. Tibshirani et al., "Conformal prediction under covariate shift", NeurIPS 2019, section 2.
func Find(reference []schema.Sample, alpha float64) (Bound, bool) {
	if effective(reference) < Needed(alpha) {
		return Bound{}, false
	}
	total, most := requests(reference)
	total += most
	slices.SortFunc(reference, func(a, b schema.Sample) int { return compare(b, a) }) // the most uncertain first
	// p(s) <= alpha means that the reference at or above s weighs at most this, so s lies above the sample beyond it.
	allowed := alpha*total - most + 1e-9*most
	last := reference[len(reference)-1]
	above := 0.0
	for _, s := range reference {
		if above += s.Requests(); above > allowed {
			last = s
			break
		}
	}
	b := Bound{N: len(reference)}
	if last.Saturated {
		distance := math.Nextafter(last.Distance, math.Inf(1))
		b.Value, b.Distance = math.Nextafter(last.Value, math.Inf(1)), &distance
	} else {
		b.Value = math.Nextafter(last.Value, math.Inf(1))
	}
	reached := most
	for _, s := range reference {
		if compare(s, last) <= 0 { // ties of last do not alert
			break
		}
		reached += s.Requests()
	}
	b.Achieved = reached / total
	return b, true
}

// minimal is the number of scores that a class needs to be compared with other classes.
const minimal = 8

// Clusters groups classes with similar distributions of scores. It orders the classes by their medians and joins the
// two most similar neighbors until no neighbors agree at the 5% level of the two-sample Kolmogorov-Smirnov test.
// Classes with fewer than 8 scores stay out. The result maps each class of a cluster to the cluster's classes, in
// ascending order.
func Clusters(samples map[int][]schema.Sample) map[int][]int {
	clusters := ordered(samples)
	gaps := make([]float64, 0, len(clusters))
	for i := 1; i < len(clusters); i++ {
		gaps = append(gaps, unlike(clusters[i-1], clusters[i]))
	}
	for len(gaps) > 0 {
		at := slices.Index(gaps, slices.Min(gaps))
		if gaps[at] > 1 {
			break
		}
		joined := join(clusters[at], clusters[at+1])
		clusters[at] = joined
		clusters = slices.Delete(clusters, at+1, at+2)
		gaps = slices.Delete(gaps, at, at+1)
		if at > 0 {
			gaps[at-1] = unlike(clusters[at-1], joined)
		}
		if at < len(gaps) {
			gaps[at] = unlike(joined, clusters[at+1])
		}
	}
	of := map[int][]int{}
	for _, c := range clusters {
		slices.Sort(c.classes)
		for _, class := range c.classes {
			of[class] = c.classes
		}
	}
	return of
}

// cluster is classes whose scores are pooled.
type cluster struct {
	classes []int
	values  []float64 // sorted
	weights []float64 // of the values
}

// ordered returns a cluster for each class with enough scores, in order of their medians.
func ordered(samples map[int][]schema.Sample) []cluster {
	var clusters []cluster
	for class, list := range samples {
		if len(list) < minimal {
			continue
		}
		c := cluster{classes: []int{class}}
		for _, s := range list {
			value := s.Value
			if s.Saturated { // above all others, by distance
				value = math.MaxFloat64 / 4 * (1 + s.Distance/(1+math.Abs(s.Distance)))
			}
			c.values, c.weights = append(c.values, value), append(c.weights, s.Requests())
		}
		stat.SortWeighted(c.values, c.weights)
		clusters = append(clusters, c)
	}
	slices.SortFunc(clusters, func(a, b cluster) int {
		return cmp.Or(cmp.Compare(a.median(), b.median()), cmp.Compare(a.classes[0], b.classes[0]))
	})
	return clusters
}

// median returns the upper median of the weighed values.
func (c cluster) median() float64 {
	half := floats.Sum(c.weights) / 2
	for i, w := range c.weights {
		if half -= w; half < 0 {
			return c.values[i]
		}
	}
	return c.values[len(c.values)-1]
}

// size returns how many values of equal weight vary as little as the weighed ones do (L. Kish, "Survey Sampling",
// 1965).
func (c cluster) size() float64 {
	sum := floats.Sum(c.weights)
	return sum * sum / floats.Dot(c.weights, c.weights)
}

// unlike is at most 1 if two clusters agree.
func unlike(a, b cluster) float64 {
	n, m := a.size(), b.size()
	return stat.KolmogorovSmirnov(a.values, a.weights, b.values, b.weights) / (1.358 * math.Sqrt((n+m)/(n*m)))
}

func join(a, b cluster) cluster {
	joined := cluster{
		slices.Concat(a.classes, b.classes), slices.Concat(a.values, b.values), slices.Concat(a.weights, b.weights),
	}
	stat.SortWeighted(joined.values, joined.weights)
	return joined
}

// Options say what is calibrated.
type Options struct {
	Alpha       float64 // wanted false-alarm rate, between 0 and 1
	Classes     int     // of the model
	WellSampled []int   // classes whose scores make the model's threshold: what the model should know. Empty: all
}

// Result is what was found for one scope.
type Result struct {
	Scope   schema.Scope
	Class   int   // -1 for the model
	Cluster []int // the classes whose scores were pooled, for a cluster
	Own     int   // scores of the class itself
	Bound
}

// TooFewError is returned by Calibrate if not even the model has the scores that alpha takes.
type TooFewError struct {
	Alpha  float64
	Needed int
	Given  int // scores of equal weight that the stored ones are worth
	Stored int
}

// Error says how many scores are missing.
func (e *TooFewError) Error() string {
	given := fmt.Sprintf("%d are there", e.Given)
	if e.Given != e.Stored {
		given = fmt.Sprintf("the %d that are there are worth %d, because they were sampled with unequal shares",
			e.Stored, e.Given)
	}
	return fmt.Sprintf("a false-alarm rate of %g takes %d scores, %s: %d are missing (with these, the least rate is %.3g)",
		e.Alpha, e.Needed, given, e.Needed-e.Given, 1/float64(e.Given+1))
}

// Calibrate finds the threshold of the model and of each class that has enough scores, alone or together with its
// cluster. Other classes have no result: the model's threshold applies to them. The model's result comes first, then
// the classes in order. The error is a *TooFewError if the model itself has too few scores.
func Calibrate(samples []schema.Sample, o Options) ([]Result, error) {
	if !(o.Alpha > 0 && o.Alpha < 1) {
		return nil, fmt.Errorf("alpha is %g, must lie between 0 and 1", o.Alpha)
	}
	byClass := map[int][]schema.Sample{}
	for _, s := range samples {
		if s.Class < 0 || s.Class >= o.Classes {
			return nil, fmt.Errorf("a score is of class %d, the model has %d classes", s.Class, o.Classes)
		}
		byClass[s.Class] = append(byClass[s.Class], s)
	}
	var pool []schema.Sample
	for class, list := range byClass {
		if len(o.WellSampled) == 0 || slices.Contains(o.WellSampled, class) {
			pool = append(pool, list...)
		}
	}
	bound, ok := Find(pool, o.Alpha)
	if !ok {
		return nil, &TooFewError{o.Alpha, Needed(o.Alpha), effective(pool), len(pool)}
	}
	results := []Result{{Scope: schema.ScopeModel, Class: -1, Own: len(pool), Bound: bound}}
	clusters := Clusters(byClass)
	found := map[int]Bound{} // by the first class of a cluster
	for class := range o.Classes {
		own := byClass[class]
		if bound, ok := Find(slices.Clone(own), o.Alpha); ok {
			results = append(results, Result{Scope: schema.ScopeClass, Class: class, Own: len(own), Bound: bound})
			continue
		}
		members := clusters[class]
		if len(members) < 2 {
			continue
		}
		bound, ok := found[members[0]]
		if !ok {
			var joined []schema.Sample
			for _, member := range members {
				joined = append(joined, byClass[member]...)
			}
			if bound, ok = Find(joined, o.Alpha); ok {
				found[members[0]] = bound
			}
		}
		if ok {
			results = append(results, Result{
				Scope: schema.ScopeCluster, Class: class, Cluster: members, Own: len(own), Bound: bound,
			})
		}
	}
	return results, nil
}

// Key is what the thresholds of one calibration have in common.
type Key struct {
	schema.Series
	Measurement schema.MeasurementName `json:"measurement"`
	Severity    schema.Severity        `json:"severity"`
}

// Matches reports whether a threshold has the key.
func (k Key) Matches(t schema.Threshold) bool {
	return t.Series() == k.Series && t.Measurement == k.Measurement && t.Severity == k.Severity
}

// Count returns by class on how many of the samples the thresholds raise an alert of the key's measurement, of any
// severity. It decides as live scores are decided.
func Count(samples []schema.Sample, k Key, t *alerts.Table) map[int]int {
	counts := map[int]int{}
	for _, s := range samples {
		score := schema.Score{
			Event: schema.Event{Data: schema.Generation{Model: k.Model}}, ClassIndex: s.Class,
			Receipt: schema.Receipt{EnsembleDigest: k.EnsembleDigest, Settings: k.Settings},
		}
		score.SetMeasurement(k.Measurement,
			schema.Measurement{Value: s.Value, MeanDistance: s.Distance, Saturated: s.Saturated})
		for _, a := range alerts.Decide(score, t).Alerts {
			if a.Measurement == k.Measurement {
				counts[s.Class]++
			}
		}
	}
	return counts
}

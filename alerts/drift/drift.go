// Package drift detects a rise of scores above a frozen reference.
package drift

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"sort"
	"strconv"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/stat"
)

// Reference is the frozen distribution that scores are compared with. Its zero value is empty: every p-value is 1.
type Reference struct {
	sorted []float64 // all samples, or nil
	above  []float64 // the p-value of each of them
	bounds []float64 // else quantiles, ascending,
	tails  []float64 // and the share of the reference at or above each
}

// NewReference returns the reference of a copy of the samples and their weights. They must be finite, and weights
// positive. Nil weights are all equal.
func NewReference(samples, weights []float64) Reference {
	r := Reference{sorted: slices.Clone(samples), above: slices.Clone(weights)}
	if weights == nil {
		r.above = slices.Repeat([]float64{1}, len(samples))
	}
	if len(samples) == 0 {
		return r
	}
	stat.SortWeighted(r.sorted, r.above)
	most := slices.Max(r.above) // the request that is asked about counts with it
	total, reached := most+floats.Sum(r.above), most
	for i, w := range slices.Backward(r.above) {
		reached += w
		r.above[i] = reached / total
	}
	r.above = append(r.above, most/total)
	return r
}

// Quantiles returns a reference of which only some quantiles of n samples are known. The keys are probabilities, as an
// ensemble's manifest has them. Its p-values are never smaller than the samples' own p-values would be: tests on them
// keep their guarantee and lose only power.
func Quantiles(n int, quantiles map[string]float64) (Reference, error) {
	values := map[float64]float64{}
	for name, v := range quantiles {
		q, err := strconv.ParseFloat(name, 64)
		if err != nil || !(q > 0 && q < 1) {
			return Reference{}, fmt.Errorf("quantile %s is out of range (0, 1)", name)
		}
		values[q] = v
	}
	var r Reference
	for _, q := range slices.Sorted(maps.Keys(values)) {
		v := values[q]
		if math.IsNaN(v) || len(r.bounds) > 0 && v < r.bounds[len(r.bounds)-1] {
			return Reference{}, fmt.Errorf("quantile %g is %g: quantiles must ascend", q, v)
		}
		r.bounds = append(r.bounds, v)
		r.tails = append(r.tails, (math.Ceil((1-q)*float64(n))+1)/float64(n+1))
	}
	return r, nil
}

// Empty reports whether the reference has neither samples nor quantiles.
func (r Reference) Empty() bool { return len(r.sorted) == 0 && len(r.bounds) == 0 }

// PValue returns the conformal p-value of x: (1 + #{reference >= x}) / (n + 1), or an upper bound of it. Weighed
// samples count with their weights, and x with the greatest of them.
func (r Reference) PValue(x float64) float64 {
	if len(r.sorted) > 0 {
		return r.above[sort.SearchFloat64s(r.sorted, x)]
	}
	p := 1.0
	for i, bound := range r.bounds {
		if x >= bound {
			p = min(p, r.tails[i])
		}
	}
	return p
}

// Bet returns the e-value of a p-value, the mixture of all powers k p^(k-1), 0 < k < 1: (1 - p + p ln p) / (p ln^2 p).
// Its mean is 1 if p is uniform, and at most 1 if p is conservative. It is above 1 for p below about 0.18, and 1/2 at
// p = 1. p must lie in (0, 1].
//
// Reference: V. Vovk, R. Wang, "E-values: Calibration, combination and applications", Annals of Statistics 2021,
// equation (2).
func Bet(p float64) float64 {
	if p >= 1 {
		return 0.5
	}
	l := math.Log(p)
	if l > -1e-4 { // the quotient loses its digits; its series at p = 1
		return 0.5 + l/-6
	}
	return (1 - p + p*l) / (p * l * l)
}

// Rise is what Scan found.
type Rise struct {
	At       int     // index of the observation at which the alarm went off
	Evidence float64 // the detector's value there, at least the run length
}

// Scan finds the first moment at which a sequence of p-values, in order of time, shows a rise above the reference. It
// raises the alarm when the Shiryaev-Roberts e-detector R = (1 + R) Bet(p) reaches runLength. Without a rise, the
// expected number of observations until a false alarm is at least runLength, whatever the distribution. The p-values
// must be independent and not smaller than uniform. The second result is false if there was no alarm.
//
// Weights say how many requests each observation stands for; nil means equally many. An observation of weight w bets
// the share w / max w: E = 1 + (Bet(p) - 1) w / max w. Over sampled traffic, its mean is at most 1 if the p-values of
// all requests are not smaller than uniform, so the run length holds whatever was sampled less.
//
// Reference: J. Shin, A. Ramdas, A. Rinaldo, "E-detectors: a nonparametric framework for sequential change detection",
// New England Journal of Statistics in Data Science 2024, theorem 2.4.
func Scan(p, weights []float64, runLength float64) (Rise, bool) {
	r, share := 0.0, func(int) float64 { return 1 }
	if len(weights) > 0 {
		most := slices.Max(weights)
		share = func(i int) float64 { return weights[i] / most }
	}
	for i, p := range p {
		r = (1 + r) * (1 + (Bet(p)-1)*share(i))
		if r >= runLength {
			return Rise{At: i, Evidence: r}, true
		}
	}
	return Rise{}, false
}

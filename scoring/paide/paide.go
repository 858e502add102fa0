// Package paide estimates epistemic uncertainty from pairwise distances between the predictive distributions of an
// ensemble's components: numbers in, numbers out.
//
// References: Kolchinsky and Tracey, "Estimating Mixture Entropy with Pairwise Distances" (Entropy 2017); Berry and
// Meger, "Efficient Epistemic Uncertainty Estimation in Regression Ensemble Models Using Pairwise-Distance Estimators"
// (arXiv 2308.13498); Berry, Brando and Meger (UAI 2024).
package paide

import "math"

// SaturationTolerance is the distance from ln M, relative to ln M, within which an estimate counts as saturated. It is
// less than the tolerance of a score, so such estimates no longer rank.
const SaturationTolerance = 1e-3

// Distances is a symmetric M x M matrix of distances with a zero diagonal, row by row.
type Distances struct {
	M      int
	Values []float64
}

// At returns the distance between components i and j.
func (d Distances) At(i, j int) float64 { return d.Values[i*d.M+j] }

// Scaled returns the distances times f.
func (d Distances) Scaled(f float64) Distances {
	values := make([]float64, len(d.Values))
	for i, v := range d.Values {
		values[i] = f * v
	}
	return Distances{d.M, values}
}

// SquaredW2 returns the squared 2-Wasserstein distances |mu_i - mu_j|^2 between Gaussians of the same covariance,
// which are also the distances between points. The means, all of one length, are single precision; sums are double. It
// panics if lengths differ.
//
// With a common variance s^2 in every dimension, Kullback-Leibler divergences are these times KLFactor(s), and
// Bhattacharyya distances these times BhattacharyyaFactor(s).
func SquaredW2(means [][]float32) Distances {
	m := len(means)
	d := Distances{m, make([]float64, m*m)}
	for i, a := range means {
		for j := i + 1; j < m; j++ {
			v := squaredDistance(a, means[j])
			d.Values[i*m+j], d.Values[j*m+i] = v, v
		}
	}
	return d
}

func squaredDistance(a, b []float32) float64 {
	if len(a) != len(b) {
		panic("paide: means of different length")
	}
	// Four sums break the chain of additions, which bounds the loop otherwise.
	var s0, s1, s2, s3 float64
	i := 0
	for ; i+4 <= len(a); i += 4 {
		x, y := a[i:i+4:i+4], b[i:i+4:i+4]
		d0, d1 := float64(x[0])-float64(y[0]), float64(x[1])-float64(y[1])
		d2, d3 := float64(x[2])-float64(y[2]), float64(x[3])-float64(y[3])
		s0, s1, s2, s3 = s0+d0*d0, s1+d1*d1, s2+d2*d2, s3+d3*d3
	}
	for ; i < len(a); i++ {
		d := float64(a[i]) - float64(b[i])
		s0 += d * d
	}
	return s0 + s1 + s2 + s3
}

// KLFactor returns 1/(2 s^2), the factor that turns squared distances of means into Kullback-Leibler divergences
// between Gaussians of standard deviation s in every dimension.
func KLFactor(s float64) float64 { return 1 / (2 * s * s) }

// BhattacharyyaFactor returns 1/(8 s^2), the factor that turns squared distances of means into Bhattacharyya distances
// between Gaussians of standard deviation s in every dimension.
func BhattacharyyaFactor(s float64) float64 { return 1 / (8 * s * s) }

// Estimate returns PaiDE with equal weights 1/M, in nats, 0 to ln M:
//
//	I = - sum_i 1/M ln( sum_j 1/M exp(-D_ij) )
//
// D need not be symmetric; its entries must not be negative. Sums of exponentials are taken around their largest term.
// With Kullback-Leibler divergences I bounds the mixture's mutual information from above, with Bhattacharyya distances
// from below (Kolchinsky and Tracey, equations 11 and 13).
func Estimate(d Distances) float64 {
	total := 0.0
	for i := range d.M {
		total += logMeanExp(d.Values[i*d.M : (i+1)*d.M])
	}
	// The diagonal keeps each inner sum within [1/M, 1]; rounding is cut off at both ends.
	return min(max(0, -total/float64(d.M)), math.Log(float64(d.M)))
}

// logMeanExp returns ln( 1/n sum exp(-d) ).
func logMeanExp(d []float64) float64 {
	least := math.Inf(1)
	for _, v := range d {
		least = min(least, v)
	}
	sum := 0.0
	for _, v := range d {
		sum += math.Exp(least - v)
	}
	return math.Log(sum/float64(len(d))) - least
}

// UpperBound returns ln M.
func UpperBound(m int) float64 { return math.Log(float64(m)) }

// Saturated reports whether an estimate of m components is within SaturationTolerance of its upper bound.
func Saturated(value float64, m int) bool {
	return value >= (1-SaturationTolerance)*UpperBound(m)
}

// Mean returns the mean of the distances between different components, the companion that cannot saturate.
func Mean(d Distances) float64 {
	if d.M < 2 {
		return 0
	}
	sum := 0.0
	for _, v := range d.Values {
		sum += v
	}
	return sum / float64(d.M*(d.M-1))
}

// Shares returns each component's share of the sum of distances. They sum to 1. If all components differ alike, or not
// at all, each is 1/M. A single odd component has up to 1/2: a sign of a broken table rather than of a gap in the
// data.
func Shares(d Distances) []float64 {
	shares := make([]float64, d.M)
	total := 0.0
	for i := range d.M {
		for j := range d.M {
			shares[i] += d.At(i, j) + d.At(j, i)
		}
		total += shares[i]
	}
	for i := range shares {
		if total > 0 {
			shares[i] /= total
		} else {
			shares[i] = 1 / float64(d.M)
		}
	}
	return shares
}

// Map returns PaiDE of every position: means[m] is a [channels, positions] array of component m, and the distance at a
// position is the squared one summed over channels. The mean of the map is the estimator pixel-paide-w2.
func Map(means [][]float32, channels, positions int) []float64 {
	m := len(means)
	result := make([]float64, positions)
	d := Distances{m, make([]float64, m*m)}
	for p := range result {
		for i := range m {
			for j := i + 1; j < m; j++ {
				sum := 0.0
				for c := range channels {
					v := float64(means[i][c*positions+p]) - float64(means[j][c*positions+p])
					sum += v * v
				}
				d.Values[i*m+j], d.Values[j*m+i] = sum, sum
			}
		}
		result[p] = Estimate(d)
	}
	return result
}

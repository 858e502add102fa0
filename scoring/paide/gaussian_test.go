package paide

import "math"

// Gaussian is a Gaussian with diagonal covariance.
type Gaussian struct {
	Mean  []float64
	Sigma []float64 // standard deviations, positive
}

// KL returns the Kullback-Leibler divergence KL(p || q), the sum over dimensions of
//
//	ln(s_q/s_p) + (s_p^2 + (mu_p - mu_q)^2) / (2 s_q^2) - 1/2
//
// Both must have one number of dimensions.
func KL(p, q Gaussian) float64 {
	sum := 0.0
	for d := range p.Mean {
		delta := p.Mean[d] - q.Mean[d]
		sum += math.Log(q.Sigma[d]/p.Sigma[d]) + (p.Sigma[d]*p.Sigma[d]+delta*delta)/(2*q.Sigma[d]*q.Sigma[d]) - 0.5
	}
	return sum
}

// Bhattacharyya returns the Bhattacharyya distance, the sum over dimensions of
//
//	(mu_p - mu_q)^2 / (4 (s_p^2 + s_q^2)) + 1/2 ln( (s_p^2 + s_q^2) / (2 s_p s_q) )
//
// Logarithms are summed: a product over dimensions overflows.
func Bhattacharyya(p, q Gaussian) float64 {
	sum := 0.0
	for d := range p.Mean {
		delta := p.Mean[d] - q.Mean[d]
		variance := p.Sigma[d]*p.Sigma[d] + q.Sigma[d]*q.Sigma[d]
		sum += delta*delta/(4*variance) + 0.5*math.Log(variance/(2*p.Sigma[d]*q.Sigma[d]))
	}
	return sum
}

// W2 returns the squared 2-Wasserstein distance, the sum over dimensions of (mu_p - mu_q)^2 + (s_p - s_q)^2. Here a
// standard deviation may be zero.
func W2(p, q Gaussian) float64 {
	sum := 0.0
	for d := range p.Mean {
		mean, sigma := p.Mean[d]-q.Mean[d], p.Sigma[d]-q.Sigma[d]
		sum += mean*mean + sigma*sigma
	}
	return sum
}

// Pairwise returns the distances between all components under the given distance; the diagonal is zero.
func Pairwise(components []Gaussian, distance func(p, q Gaussian) float64) Distances {
	m := len(components)
	d := Distances{m, make([]float64, m*m)}
	for i, p := range components {
		for j, q := range components {
			if i != j {
				d.Values[i*m+j] = distance(p, q)
			}
		}
	}
	return d
}

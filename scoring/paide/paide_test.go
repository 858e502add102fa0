package paide

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"gonum.org/v1/gonum/mat"
	"gonum.org/v1/gonum/stat/distmv"
)

func randomMeans(r *rand.Rand, m, n int, scale float64) [][]float32 {
	means := make([][]float32, m)
	for i := range means {
		means[i] = make([]float32, n)
		for j := range means[i] {
			means[i][j] = float32(scale * r.NormFloat64())
		}
	}
	return means
}

// The diagonal formulas against gonum's for full covariances.
func TestDistancesAgreeWithFullCovariances(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for trial := range 200 {
		dims := 1 + trial%6
		gaussian := func() (Gaussian, *distmv.Normal) {
			g := Gaussian{make([]float64, dims), make([]float64, dims)}
			covariance := mat.NewSymDense(dims, nil)
			for d := range dims {
				g.Mean[d] = 2 * r.NormFloat64()
				g.Sigma[d] = math.Exp(r.NormFloat64())
				covariance.SetSym(d, d, g.Sigma[d]*g.Sigma[d])
			}
			full, ok := distmv.NewNormal(g.Mean, covariance, nil)
			if !ok {
				t.Fatal("covariance is not positive definite")
			}
			return g, full
		}
		p, fullP := gaussian()
		q, fullQ := gaussian()
		for _, c := range []struct {
			name       string
			have, want float64
		}{
			{"KL", KL(p, q), distmv.KullbackLeibler{}.DistNormal(fullP, fullQ)},
			{"Bhattacharyya", Bhattacharyya(p, q), distmv.Bhattacharyya{}.DistNormal(fullP, fullQ)},
			{"W2", W2(p, q), distmv.Wasserstein{}.DistNormal(fullP, fullQ)}, // squared, as gonum returns it
		} {
			if !near(c.have, c.want, 1e-9) {
				t.Errorf("%s in %d dimensions: %v, gonum has %v", c.name, dims, c.have, c.want)
			}
		}
	}
}

func near(a, b, tolerance float64) bool {
	return math.Abs(a-b) <= tolerance*max(1, math.Abs(a), math.Abs(b))
}

// With one variance everywhere, squared distances of means carry all three distances.
func TestCommonVariance(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, sigma := range []float64{0.05, 1, 3} {
		means := randomMeans(r, 4, 37, 0.2)
		components := make([]Gaussian, len(means))
		for i, mean := range means {
			for _, v := range mean {
				components[i].Mean = append(components[i].Mean, float64(v))
				components[i].Sigma = append(components[i].Sigma, sigma)
			}
		}
		squared := SquaredW2(means)
		for _, c := range []struct {
			name       string
			have, want Distances
		}{
			{"W2", squared, Pairwise(components, W2)},
			{"KL", squared.Scaled(KLFactor(sigma)), Pairwise(components, KL)},
			{"Bhattacharyya", squared.Scaled(BhattacharyyaFactor(sigma)), Pairwise(components, Bhattacharyya)},
		} {
			for i := range c.have.Values {
				if !near(c.have.Values[i], c.want.Values[i], 1e-9) {
					t.Fatalf("%s, sigma %v: %v, want %v", c.name, sigma, c.have.Values[i], c.want.Values[i])
				}
			}
		}
	}
}

func TestEstimateProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for trial := range 300 {
		m, n := 2+trial%9, 1+trial%70
		means := randomMeans(r, m, n, math.Exp(2*r.NormFloat64()))
		d := SquaredW2(means)
		value := Estimate(d)
		if value < 0 || value > UpperBound(m) {
			t.Fatalf("estimate %v of %d components is outside [0, ln M]", value, m)
		}
		order := r.Perm(m)
		shuffled := make([][]float32, m)
		for i, j := range order {
			shuffled[i] = means[j]
		}
		if other := Estimate(SquaredW2(shuffled)); !near(value, other, 1e-12) {
			t.Errorf("order of components changes the estimate: %v, %v", value, other)
		}
		if twice := Estimate(SquaredW2(slices.Concat(means, means))); !near(value, twice, 1e-12) {
			t.Errorf("every component doubled changes the estimate: %v, %v", value, twice)
		}
		shares, sum := Shares(d), 0.0
		for _, s := range shares {
			sum += s
		}
		if !near(sum, 1, 1e-12) || slices.Max(shares) > 0.5+1e-12 {
			t.Errorf("shares %v sum to %v", shares, sum)
		}
		// More distance, more uncertainty.
		if farther := Estimate(d.Scaled(1.5)); farther < value-1e-12 {
			t.Errorf("distances times 1.5 lower the estimate: %v to %v", value, farther)
		}
	}
}

func TestEstimateAtItsEnds(t *testing.T) {
	same := [][]float32{{1, 2}, {1, 2}, {1, 2}}
	if v := Estimate(SquaredW2(same)); v != 0 {
		t.Errorf("equal components: %v, want 0", v)
	}
	if shares := Shares(SquaredW2(same)); shares[0] != 1./3 {
		t.Errorf("equal components share %v", shares)
	}
	// exp underflows at a distance of about 745; the estimate is then ln M exactly, for any distance beyond.
	for _, scale := range []float32{30, 1e5, 1e18} {
		d := SquaredW2([][]float32{{0}, {scale}, {-scale}})
		if v := Estimate(d); v != UpperBound(3) || !Saturated(v, 3) {
			t.Errorf("far components: %v, want ln 3 = %v, saturated", v, UpperBound(3))
		}
		if mean := Mean(d); !near(mean, 2*float64(scale)*float64(scale), 1e-6) {
			t.Errorf("mean distance %v saturates", mean)
		}
	}
	// Two components at distance D: I = ln 2 - ln(1 + exp(-D)).
	for _, distance := range []float64{1e-9, 0.3, 2, 20} {
		d := Distances{2, []float64{0, distance, distance, 0}}
		if have, want := Estimate(d), math.Ln2-math.Log1p(math.Exp(-distance)); math.Abs(have-want) > 1e-15+1e-7*want {
			t.Errorf("two components at %v: %v, want %v", distance, have, want)
		}
	}
}

func TestSharesFindTheOddComponent(t *testing.T) {
	shares := Shares(SquaredW2([][]float32{{0, 0}, {0.1, 0}, {5, 5}, {0, 0.1}}))
	if shares[2] < 0.49 {
		t.Errorf("shares %v, the third component is the odd one", shares)
	}
}

func TestMap(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	const channels, positions = 3, 5
	means := randomMeans(r, 4, channels*positions, 1)
	have := Map(means, channels, positions)
	for p := range positions {
		at := make([][]float32, len(means))
		for i, mean := range means {
			for c := range channels {
				at[i] = append(at[i], mean[c*positions+p])
			}
		}
		if want := Estimate(SquaredW2(at)); !near(have[p], want, 1e-12) {
			t.Errorf("position %d: %v, want %v", p, have[p], want)
		}
	}
}

func BenchmarkEstimate(b *testing.B) {
	r := rand.New(rand.NewPCG(9, 10))
	for _, size := range []struct{ m, n int }{{5, 256}, {10, 256}, {5, 3072}, {5, 12288}, {5, 16384}} {
		means := randomMeans(r, size.m, size.n, 0.01)
		b.Run(fmt.Sprintf("M=%d/dims=%d", size.m, size.n), func(b *testing.B) {
			for b.Loop() {
				Estimate(SquaredW2(means))
			}
		})
	}
}

// Estimators of given means against PyTorch; make golden writes the file.
func TestEstimatorsEqualPyTorch(t *testing.T) {
	content, err := os.ReadFile("../testdata/arithmetic.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		Estimators []struct {
			Sigma  float64            `json:"sigma"`
			Means  [][]float32        `json:"means"` // [M][3*2*2]
			Values map[string]float64 `json:"values"`
		} `json:"estimators"`
	}
	if err := json.Unmarshal(content, &golden); err != nil {
		t.Fatal(err)
	}
	if len(golden.Estimators) < 20 {
		t.Fatalf("%d cases", len(golden.Estimators))
	}
	for i, c := range golden.Estimators {
		d := SquaredW2(c.Means)
		pixel := 0.0
		for _, v := range Map(c.Means, 3, 4) {
			pixel += v / 4
		}
		for name, have := range map[string]float64{
			"paide-w2":            Estimate(d),
			"paide-kl":            Estimate(d.Scaled(KLFactor(c.Sigma))),
			"paide-bhattacharyya": Estimate(d.Scaled(BhattacharyyaFactor(c.Sigma))),
			"mean-w2":             Mean(d),
			"pixel-paide-w2":      pixel,
		} {
			// Relative, but for values so near 0 that ln of a sum near 1 keeps few digits.
			if want, ok := c.Values[name]; !ok || math.Abs(have-want) > 1e-5*math.Abs(want)+1e-14 {
				t.Errorf("case %d, %d components, %s: %v, want %v", i, len(c.Means), name, have, want)
			}
		}
	}
}

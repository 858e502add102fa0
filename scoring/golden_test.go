package scoring

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

const (
	shipped    = "../ensembles/fashion-mnist"
	tiny       = "testdata/tiny"
	tinyTokens = "testdata/tiny-tokens"
)

// open opens an engine that ends with the test.
func open(t testing.TB, path string, o Options) *Engine {
	t.Helper()
	e, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// goldenCase is one case of an ensemble's golden.json, which export and make golden write.
type goldenCase struct {
	Class     int                `json:"class"`
	Seed      uint64             `json:"seed"`
	Steps     int                `json:"steps"`
	Guidance  float64            `json:"guidance_scale"`
	Eta       float64            `json:"eta"`
	Branch    int                `json:"branch_step"`
	Rollout   int                `json:"rollout_steps"`
	Key       string             `json:"key"`
	Carrier   int                `json:"carrier"`
	First     []float32          `json:"first"`
	Means     [][]float32        `json:"means"`
	Distances [][]float64        `json:"distances"`
	Values    map[string]float64 `json:"values"`
	Final     []float32          `json:"final"`
}

func readGolden(t *testing.T, dir string) []goldenCase {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(dir, "golden.json"))
	if err != nil {
		t.Fatalf("%v: make golden writes it", err)
	}
	manifest, err := os.ReadFile(filepath.Join(dir, ensemble.ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		Manifest string       `json:"manifest_sha256"`
		Cases    []goldenCase `json:"cases"`
	}
	if err := json.Unmarshal(content, &golden); err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(manifest); golden.Manifest != hex.EncodeToString(sum[:]) {
		t.Fatalf("%s/golden.json belongs to another manifest: run make golden", dir)
	}
	if len(golden.Cases) < 6 {
		t.Fatalf("%d cases", len(golden.Cases))
	}
	return golden.Cases
}

// relative returns |a-b| / |b|.
func relative(a, b []float32) float64 {
	var difference, norm float64
	for i := range b {
		d := float64(a[i]) - float64(b[i])
		difference += d * d
		norm += float64(b[i]) * float64(b[i])
	}
	return math.Sqrt(difference / norm)
}

// The sampler gives the latents, means and scores that diffusers' DDIMScheduler gives with PyTorch's noise.
func TestGolden(t *testing.T) {
	for _, dir := range []string{shipped, tiny, tinyTokens} {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			cases := readGolden(t, dir)
			e := open(t, dir, Options{Threads: 1})
			// Of distances near 0 the latents' last digits leave nothing: components with random weights hardly differ.
			const floor = 1e-4
			var first, means, final, given, own float64
			for i, c := range cases {
				measures := []Measure{
					at(c.Steps, c.Branch, c.Rollout, ensemble.PaiDEW2),
					at(c.Steps, c.Steps-1, 1, ensemble.MeanW2), // its carrier is the final latent
				}
				profile := Profile{GuidanceScale: c.Guidance, Eta: c.Eta}
				p, err := newPlan(e.ensemble, profile, measures)
				if err != nil {
					t.Fatal(err)
				}
				r := Request{Key: c.Key, Class: c.Class, Seed: c.Seed}
				f, receipt, err := e.run(t.Context(), r, p, c.Eta)
				if err != nil {
					t.Fatal(err)
				}
				if receipt.Carrier != c.Carrier {
					t.Errorf("case %d: carrier %d, want %d", i, receipt.Carrier, c.Carrier)
				}
				for m, want := range c.Means {
					means = max(means, relative(f.means[0][m], want))
				}
				final = max(final, relative(f.means[1][c.Carrier], c.Final))
				for _, estimator := range []string{ensemble.PaiDEW2, ensemble.PaiDEKL, ensemble.PaiDEBhattacharyya,
					ensemble.MeanW2, ensemble.PixelPaiDEW2} {
					m := measures[0]
					m.Estimator = estimator
					want := c.Values[estimator]
					have := p.measure(m, c.Means, e.ensemble.Latent).Value
					given = max(given, math.Abs(have-want)/(want+floor))
					have = p.measure(m, f.means[0], e.ensemble.Latent).Value
					own = max(own, math.Abs(have-want)/(want+floor))
				}
				e.sampler.release(f)
				noise := firstLatent(t, e, r)
				for j := range noise {
					first = max(first, math.Abs(float64(noise[j]-c.First[j])))
				}
			}
			t.Logf("first latents %.1e; relative: means %.1e, final latents %.1e, estimators of given means %.1e, scores %.1e",
				first, means, final, given, own)
			for name, bound := range map[string][2]float64{
				"first latents":             {first, 5e-6},
				"means":                     {means, 1e-4},
				"final latents":             {final, 1e-4},
				"estimators of given means": {given, 1e-5},
				"scores":                    {own, 1e-2},
			} {
				if !(bound[0] <= bound[1]) {
					t.Errorf("%s differ by %.1e, at most %.0e", name, bound[0], bound[1])
				}
			}
		})
	}
}

func firstLatent(t *testing.T, e *Engine, r Request) []float32 {
	t.Helper()
	noise, err := e.noise(r)
	if err != nil {
		t.Fatal(err)
	}
	x := make([]float32, e.ensemble.Latent.Size())
	noise.Draw(x)
	return x
}

package scoring

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

const (
	shipped    = "../ensembles/fashion-mnist"
	tiny       = "testdata/tiny"
	tinyTokens = "testdata/tiny-tokens"
	tiny2      = "testdata/tiny-2"
	tinyFlow   = "testdata/tiny-flow" // a transformer of flow matching
)

// device runs the graphs of the tests: cpu, or what DECUWATCH_TEST_DEVICE names.
var device = cmp.Or(os.Getenv("DECUWATCH_TEST_DEVICE"), "cpu")

// open opens an engine that ends with the test, on the device of the tests if the options name no other.
func open(t testing.TB, path string, o Options) *Engine {
	t.Helper()
	o.Device = cmp.Or(o.Device, device)
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
	Tables    string             `json:"tables"`   // "" stands for the members
	Mode      string             `json:"guidance"` // "" stands for each table's own
	Branch    int                `json:"branch_step"`
	Rollout   int                `json:"rollout_steps"`
	Key       string             `json:"key"`
	Carrier   int                `json:"carrier"`
	First     []float32          `json:"first"`
	Means     [][]float32        `json:"means"`
	Distances [][]float64        `json:"distances"`
	Values    map[string]float64 `json:"values"`
	Final     []float32          `json:"final"` // of the carrier; shared guidance has none
}

// judgedCase is one case of the judge.
type judgedCase struct {
	Class         int       `json:"class"`
	Seed          uint64    `json:"seed"`
	Steps         int       `json:"steps"`
	Guidance      float64   `json:"guidance_scale"`
	Eta           float64   `json:"eta"`
	Rollout       int       `json:"rollout_steps"`
	Key           string    `json:"key"`
	X0            []float32 `json:"x0"`
	Image         []float32 `json:"image"`
	Probabilities []float64 `json:"probabilities"`
	Top           [][2]float64
	Value         *float64 `json:"value"` // nil if the judge cannot tell the class
}

// goldenFile is the golden.json of an ensemble.
type goldenFile struct {
	Manifest string       `json:"manifest_sha256"`
	Settings string       `json:"settings"`
	Cases    []goldenCase `json:"cases"`
	Judged   []judgedCase `json:"judged"`
}

func readGolden(t *testing.T, dir string) goldenFile {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(dir, "golden.json"))
	if err != nil {
		t.Fatalf("%v: make golden writes it", err)
	}
	manifest, err := os.ReadFile(filepath.Join(dir, ensemble.ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	var golden goldenFile
	if err := json.Unmarshal(content, &golden); err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(manifest); golden.Manifest != hex.EncodeToString(sum[:]) {
		t.Fatalf("%s/golden.json belongs to another manifest: run make golden", dir)
	}
	if len(golden.Cases) < 6 {
		t.Fatalf("%d cases", len(golden.Cases))
	}
	return golden
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

// The sampler gives the latents, means and scores that diffusers' schedulers give with PyTorch's noise.
func TestGolden(t *testing.T) {
	for _, dir := range []string{shipped, tiny, tinyTokens, tiny2, tinyFlow} {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			golden := readGolden(t, dir)
			e := open(t, dir, Options{Threads: 1})
			if golden.Settings != "" && golden.Settings != e.Profile().Settings() {
				t.Errorf("settings %q, want %q", e.Profile().Settings(), golden.Settings)
			}
			// Of distances near 0 the latents' last digits leave nothing: components with random weights hardly differ.
			const floor = 1e-4
			var first, means, final, given, own float64
			for i, c := range golden.Cases {
				measures := []Measure{at(c.Steps, c.Branch, c.Rollout, ensemble.PaiDEW2)}
				measures[0].Tables = cmp.Or(c.Tables, ensemble.TablesMembers)
				measures[0].Guidance = cmp.Or(c.Mode, ensemble.GuidanceOwn)
				if c.Final != nil {
					measures = append(measures, at(c.Steps, c.Steps-1, 1, ensemble.MeanW2)) // its carrier is the final latent
				}
				profile := Profile{GuidanceScale: c.Guidance, Eta: c.Eta}
				p, err := newPlan(e.ensemble, profile, measures)
				if err != nil {
					t.Fatal(err)
				}
				r := Request{Key: c.Key, Class: c.Class, Seed: c.Seed}
				f, receipt, err := e.run(t.Context(), r, p)
				if err != nil {
					t.Fatal(err)
				}
				if c.Final != nil && receipt.Carrier != c.Carrier {
					t.Errorf("case %d: carrier %d, want %d", i, receipt.Carrier, c.Carrier)
				}
				for m, want := range c.Means {
					means = max(means, relative(f.means[0][m], want))
				}
				if c.Final != nil {
					final = max(final, relative(f.means[1][c.Carrier], c.Final))
				}
				for _, estimator := range []string{ensemble.PaiDEW2, ensemble.PaiDEKL, ensemble.PaiDEBhattacharyya,
					ensemble.MeanW2, ensemble.PixelPaiDEW2} {
					m := measures[0]
					m.Estimator = estimator
					want, finite := c.Values[estimator]
					if !finite { // the last step of a flow has no variance
						continue
					}
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

// The judge sees the image that PyTorch's decoder makes of the producer's predicted latent, and says the same of it.
func TestGoldenImageRisk(t *testing.T) {
	for _, dir := range []string{shipped, tiny2, tinyFlow} {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			e := open(t, dir, Options{Threads: 1})
			cases := readGolden(t, dir).Judged
			if len(cases) < 4 {
				t.Fatalf("%d cases", len(cases))
			}
			worst := 0.0
			for i, c := range cases {
				profile := e.Profile()
				profile.GuidanceScale, profile.Eta = c.Guidance, c.Eta
				profile.ImageRisk.Steps, profile.ImageRisk.RolloutSteps = c.Steps, c.Rollout
				r := Request{Key: c.Key, Class: c.Class, Seed: c.Seed, Profile: profile}
				latents := predictedLatents(t, e, r)
				pictures, err := e.Pictures(t.Context(), latents)
				if err != nil {
					t.Fatal(err)
				}
				x0, image := relative(latents[0], c.X0), relative(pictures[0].Image, c.Image)
				if !(x0 <= 1e-4) || !(image <= 1e-4) {
					t.Errorf("case %d: predicted latent differs by %.1e, image by %.1e", i, x0, image)
				}
				for class, want := range c.Probabilities {
					have := pictures[0].Probabilities[class]
					if worst = max(worst, math.Abs(have-want)); !(math.Abs(have-want) <= probabilityBound) {
						t.Errorf("case %d: class %d has probability %v, want %v", i, class, have, want)
					}
				}
				checkImageRisk(t, e, r, c)
			}
			t.Logf("probabilities differ by %.1e", worst)
		})
	}
}

// probabilityBound is how far probabilities may lie from PyTorch's.
const probabilityBound = 1e-4

// predictedLatents returns the latent that the image risk of a request decodes.
func predictedLatents(t *testing.T, e *Engine, r Request) [][]float32 {
	t.Helper()
	p, err := newPlan(e.ensemble, r.Profile, []Measure{r.Profile.ImageRisk})
	if err != nil {
		t.Fatal(err)
	}
	f, _, err := e.run(t.Context(), r, p)
	if err != nil {
		t.Fatal(err)
	}
	defer e.sampler.release(f)
	return [][]float32{slices.Clone(f.means[0][0])}
}

// checkImageRisk compares the image risk of a score with a golden case.
func checkImageRisk(t *testing.T, e *Engine, r Request, c judgedCase) {
	t.Helper()
	result, err := e.Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	risk := result.ImageRisk
	if c.Value == nil {
		if risk != nil || result.ImageRiskReason != ReasonJudgeCannotTell {
			t.Errorf("class %d: image risk %+v, reason %q", c.Class, risk, result.ImageRiskReason)
		}
		return
	}
	if risk == nil || result.ImageRiskReason != "" || math.Abs(risk.Value-*c.Value) > probabilityBound ||
		risk.UpperBound != 1 || risk.Saturated || risk.MeanDistance != 0 ||
		risk.Tables != ensemble.TablesProducer || risk.Steps != c.Steps {
		t.Errorf("class %d: image risk %+v, reason %q, want %v", c.Class, risk, result.ImageRiskReason, *c.Value)
	}
	if len(risk.Top) != len(c.Top) {
		t.Fatalf("top %v, want %v", risk.Top, c.Top)
	}
	for j, want := range c.Top {
		if have := risk.Top[j]; float64(have.Class) != want[0] || math.Abs(have.Probability-want[1]) > probabilityBound {
			t.Errorf("class %d: top %v, want %v", c.Class, risk.Top, c.Top)
		}
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

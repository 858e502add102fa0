package diffusion

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"strconv"
	"testing"
)

// arithmetic is ../testdata/arithmetic.json, which make golden writes with PyTorch and diffusers.
type arithmetic struct {
	TorchCPU []struct {
		Seed  string `json:"seed"`
		Size  int    `json:"size"`
		Draws []struct {
			First []float32 `json:"first"`
			Last  []float32 `json:"last"`
			Sum   float64   `json:"sum"`
		} `json:"draws"`
	} `json:"torch_cpu"`
	Trajectories []struct {
		BetaSchedule    string    `json:"beta_schedule"`
		TimestepSpacing string    `json:"timestep_spacing"`
		Prediction      string    `json:"prediction"`
		Steps           int       `json:"steps"`
		Eta             float64   `json:"eta"`
		StepsOffset     int       `json:"steps_offset"`
		SetAlphaToOne   bool      `json:"set_alpha_to_one"`
		Timesteps       []int64   `json:"timesteps"`
		Final           []float64 `json:"final"`
	} `json:"trajectories"`
}

func readArithmetic(t *testing.T) arithmetic {
	t.Helper()
	content, err := os.ReadFile("../testdata/arithmetic.json")
	if err != nil {
		t.Fatal(err)
	}
	var a arithmetic
	if err := json.Unmarshal(content, &a); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestTorchCPUEqualsPyTorch(t *testing.T) {
	cases := readArithmetic(t).TorchCPU
	if len(cases) < 100 {
		t.Fatalf("%d cases", len(cases))
	}
	for _, c := range cases {
		seed, err := strconv.ParseUint(c.Seed, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		noise, err := NewNoise("torch-cpu", seed, c.Size, Draw{})
		if err != nil {
			t.Fatal(err)
		}
		have := make([]float32, c.Size)
		for d, want := range c.Draws {
			noise.Draw(have)
			sum := 0.0
			for _, v := range have {
				sum += float64(v)
			}
			// Each number may differ in its last places.
			if math.Abs(sum-want.Sum) > 1e-6*float64(c.Size)+1e-6 {
				t.Errorf("seed %s, size %d, draw %d: sum %v, want %v", c.Seed, c.Size, d, sum, want.Sum)
			}
			for i := range want.First {
				last := c.Size - len(want.Last) + i
				if math.Abs(float64(have[i]-want.First[i])) > 2e-6 || math.Abs(float64(have[last]-want.Last[i])) > 2e-6 {
					t.Errorf("seed %s, size %d, draw %d: %v and %v, want %v and %v", c.Seed, c.Size, d, have[i], have[last],
						want.First[i], want.Last[i])
				}
			}
		}
	}
}

// Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10).
func TestPhiloxKnownAnswers(t *testing.T) {
	for _, c := range []struct {
		counter [4]uint32
		key     [2]uint32
		want    [4]uint32
	}{
		{[4]uint32{}, [2]uint32{}, [4]uint32{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
		{
			[4]uint32{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, [2]uint32{0xffffffff, 0xffffffff},
			[4]uint32{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
		},
		{
			[4]uint32{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, [2]uint32{0xa4093822, 0x299f31d0},
			[4]uint32{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
		},
	} {
		if have := philox4x32(c.counter, c.key); have != c.want {
			t.Errorf("philox4x32(%08x, %08x) = %08x, want %08x", c.counter, c.key, have, c.want)
		}
	}
}

// Draws of the counter-based generators are standard normal, differ by seed and by draw, and do not depend on how much
// of a draw is asked for.
func TestCounterBasedNoise(t *testing.T) {
	for _, name := range []string{"torch-cuda", "decuwatch"} {
		const size = 30_000
		draws := map[string][]float32{}
		for _, seed := range []uint64{0, 1, 1 << 40} {
			noise, err := NewNoise(name, seed, size, Draw{})
			if err != nil {
				t.Fatal(err)
			}
			for d := range 2 {
				x := make([]float32, size)
				noise.Draw(x)
				draws[strconv.FormatUint(seed, 10)+"/"+strconv.Itoa(d)] = x
			}
		}
		for key, x := range draws {
			var sum, squares, fourth float64
			for _, v := range x {
				if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
					t.Fatalf("%s %s holds %v", name, key, v)
				}
				sum += float64(v)
				squares += float64(v) * float64(v)
				fourth += math.Pow(float64(v), 4)
			}
			// Six standard errors of mean, variance and fourth moment; the seeds are fixed.
			if mean := sum / size; math.Abs(mean) > 6/math.Sqrt(size) {
				t.Errorf("%s %s: mean %v", name, key, mean)
			}
			if variance := squares / size; math.Abs(variance-1) > 6*math.Sqrt(2./size) {
				t.Errorf("%s %s: variance %v", name, key, variance)
			}
			if moment := fourth / size; math.Abs(moment-3) > 6*math.Sqrt(96./size) {
				t.Errorf("%s %s: fourth moment %v", name, key, moment)
			}
			for other, y := range draws {
				if other != key && x[0] == y[0] && x[1] == y[1] {
					t.Errorf("%s: %s and %s begin alike", name, key, other)
				}
			}
		}
		noise, err := NewNoise(name, 1, 7, Draw{})
		if err != nil {
			t.Fatal(err)
		}
		short := make([]float32, 7)
		noise.Draw(short)
		for i, v := range short {
			if v != draws["1/0"][i] {
				t.Errorf("%s: element %d of a short draw is %v, of a long one %v", name, i, v, draws["1/0"][i])
			}
		}
	}
}

func TestNoiseRefuses(t *testing.T) {
	if _, err := NewNoise("numpy", 1, 10, Draw{}); !errors.Is(err, ErrUnknownGenerator) {
		t.Errorf("unknown generator: %v", err)
	}
	if _, err := NewNoise("torch-cuda", 1, MaxTorchCUDA+1, Draw{}); !errors.Is(err, ErrNoiseSize) {
		t.Errorf("size that depends on the device: %v", err)
	}
}

// Whole trajectories of a made-up network, in every convention, as diffusers' DDIMScheduler runs them. Its alphas are
// single precision, ours double, and a step from alpha 2e-9 (squaredcos_cap_v2, trailing) divides by its root.
func TestTrajectoriesEqualDiffusers(t *testing.T) {
	cases := readArithmetic(t).Trajectories
	if len(cases) < 200 {
		t.Fatalf("%d cases", len(cases))
	}
	worst := 0.0
	for _, c := range cases {
		config := Config{
			TrainTimesteps: 1000, BetaSchedule: c.BetaSchedule, BetaStart: 0.0015, BetaEnd: 0.0195, Prediction: c.Prediction,
			TimestepSpacing: c.TimestepSpacing, StepsOffset: c.StepsOffset, SetAlphaToOne: c.SetAlphaToOne,
		}
		steps, err := Steps(config, c.Steps, c.Eta)
		if err != nil {
			t.Fatal(err)
		}
		x := []float64{1, 0.5, 0, -0.5}
		for k, step := range steps {
			if c.Timesteps != nil && int64(step.Timestep) != c.Timesteps[k] {
				t.Errorf("%s, %d steps: step %d has timestep %g, want %d", c.TimestepSpacing, c.Steps, k, step.Timestep,
					c.Timesteps[k])
			}
			for i := range x {
				output := 0.3*x[i] + math.Sin(step.Timestep/50+float64(i))
				x[i] = step.Latent*x[i] + step.Output*output + step.Sigma*math.Cos(float64(k)+float64(i))
			}
		}
		var difference, norm float64
		for i := range x {
			difference += (x[i] - c.Final[i]) * (x[i] - c.Final[i])
			norm += c.Final[i] * c.Final[i]
		}
		relative := math.Sqrt(difference / norm)
		worst = max(worst, relative)
		if !(relative <= 1e-4) {
			t.Errorf("%s, %s, %s, %d steps, eta %v: %v, want %v", c.BetaSchedule, c.TimestepSpacing, c.Prediction, c.Steps,
				c.Eta, x, c.Final)
		}
	}
	t.Logf("%d trajectories, largest relative difference %.1e", len(cases), worst)
}

func TestMean(t *testing.T) {
	step := Step{Latent: 1.5, Output: -0.25}
	x, conditional, unconditional := []float32{1, 2}, []float32{4, 8}, []float32{2, 2}
	dst := make([]float32, 2)
	if !step.Mean(dst, x, conditional, nil, 7) || dst[0] != 0.5 || dst[1] != 1 {
		t.Errorf("without guidance: %v", dst)
	}
	// Guided output: 2 + 3*(4-2) = 8, 2 + 3*(8-2) = 20.
	if !step.Mean(dst, x, conditional, unconditional, 3) || dst[0] != -0.5 || dst[1] != -2 {
		t.Errorf("with guidance: %v", dst)
	}
	infinity := float32(math.Inf(1))
	for _, bad := range [][]float32{{float32(math.NaN()), 1}, {1, infinity}, {infinity, -infinity}, {math.MaxFloat32, 1}} {
		s := step
		s.Output = 4
		if s.Mean(dst, x, bad, nil, 1) {
			t.Errorf("output %v passed as finite: %v", bad, dst)
		}
	}
}

func TestStepsRefuses(t *testing.T) {
	good := Config{TrainTimesteps: 1000, BetaSchedule: "linear", BetaStart: 0.0001, BetaEnd: 0.02, Prediction: "epsilon",
		TimestepSpacing: "leading"}
	for name, change := range map[string]func(*Config, *int, *float64){
		"schedule":   func(c *Config, _ *int, _ *float64) { c.BetaSchedule = "sigmoid" },
		"spacing":    func(c *Config, _ *int, _ *float64) { c.TimestepSpacing = "karras" },
		"prediction": func(c *Config, _ *int, _ *float64) { c.Prediction = "flow" },
		"no steps":   func(_ *Config, s *int, _ *float64) { *s = 0 },
		"many steps": func(_ *Config, s *int, _ *float64) { *s = 1001 },
		"offset":     func(c *Config, s *int, _ *float64) { c.StepsOffset = 1; *s = 1000 },
		"eta":        func(_ *Config, _ *int, e *float64) { *e = math.NaN() },
		"training":   func(c *Config, _ *int, _ *float64) { c.TrainTimesteps = 0 },
	} {
		config, steps, eta := good, 20, 0.0
		change(&config, &steps, &eta)
		if _, err := Steps(config, steps, eta); err == nil {
			t.Errorf("%s was not refused", name)
		}
	}
	if _, err := Steps(good, 20, 0); err != nil {
		t.Error(err)
	}
}

package diffusion

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"slices"
	"strconv"
	"testing"
)

// sweeps is ../testdata/sweeps.json, which make golden writes with PyTorch, diffusers and numpy:
// training/decuwatch_training/sweeps.py.
type sweeps struct {
	Timesteps []struct {
		TrainTimesteps int    `json:"train_timesteps"`
		Spacing        string `json:"spacing"`
		StepsOffset    int    `json:"steps_offset"`
		Refused        []int  `json:"refused"`
		Digests        string `json:"digests"` // eight digits for each step count from 1
	} `json:"timesteps"`
	Alphas []struct {
		TrainTimesteps int     `json:"train_timesteps"`
		BetaSchedule   string  `json:"beta_schedule"`
		BetaStart      float64 `json:"beta_start"`
		BetaEnd        float64 `json:"beta_end"`
		Alphas         string  `json:"alphas"` // float32 in base64
	} `json:"alphas"`
	Trajectories []struct {
		Spacing string      `json:"spacing"`
		Finals  [][]float64 `json:"finals"` // by step count from 1
	} `json:"trajectories"`
	Noise []struct {
		Seed         string       `json:"seed"`
		Sizes        []int        `json:"sizes"`
		FirstLastSum [][3]float64 `json:"first_last_sum"`
	} `json:"noise"`
}

func readSweeps(t *testing.T) sweeps {
	t.Helper()
	content, err := os.ReadFile("../testdata/sweeps.json")
	if err != nil {
		t.Fatal(err)
	}
	var s sweeps
	if err := json.Unmarshal(content, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// of1000 is a sampler of 1000 training timesteps with the given spacing.
func of1000(spacing string) Config {
	c := Config{
		TrainTimesteps: 1000, BetaSchedule: "scaled_linear", BetaStart: 0.0015, BetaEnd: 0.0195, Prediction: "epsilon",
		TimestepSpacing: spacing,
	}
	if spacing == "leading" || spacing == "compvis" {
		c.StepsOffset = 1
	}
	return c
}

// Every step count from 1 to T has diffusers' timesteps, or is refused where diffusers leaves 0 to T-1.
func TestTimestepsOfEveryStepCount(t *testing.T) {
	tables, taken, refused := readSweeps(t).Timesteps, 0, 0
	if len(tables) < 70 {
		t.Fatalf("%d tables", len(tables))
	}
	for _, table := range tables {
		config := of1000(table.Spacing)
		config.TrainTimesteps, config.StepsOffset = table.TrainTimesteps, table.StepsOffset
		if table.Spacing == "compvis" && table.TrainTimesteps == 1 {
			continue // its offset of 1 is past the only timestep
		}
		for steps := 1; steps <= table.TrainTimesteps; steps++ {
			timesteps, err := Timesteps(config, steps)
			if refuse := slices.Contains(table.Refused, steps); refuse || err != nil {
				refused++
				if !refuse || err == nil {
					t.Errorf("%s, %d of %d, offset %d: refused is %t, error is %v",
						table.Spacing, steps, table.TrainTimesteps, table.StepsOffset, refuse, err)
				}
				continue
			}
			taken++
			if len(timesteps) != config.StepCount(steps) {
				t.Errorf("%s, %d of %d: %d timesteps, StepCount is %d",
					table.Spacing, steps, table.TrainTimesteps, len(timesteps), config.StepCount(steps))
			}
			digest := sha256.New()
			if err := binary.Write(digest, binary.LittleEndian, timesteps); err != nil {
				t.Fatal(err)
			}
			if have := hex.EncodeToString(digest.Sum(nil)[:4]); have != table.Digests[8*(steps-1):8*steps] {
				t.Errorf("%s, %d of %d, offset %d: timesteps %v differ",
					table.Spacing, steps, table.TrainTimesteps, table.StepsOffset, timesteps)
			}
		}
	}
	t.Logf("%d tables, %d step counts taken, %d refused", len(tables), taken, refused)
}

// Timesteps that were once wrong, and step counts that cannot be taken, by name.
func TestTimestepsByHand(t *testing.T) {
	for _, c := range []struct {
		spacing     string
		steps       int
		index, want int
	}{
		{"trailing", 48, 3, 936},
		{"linspace", 27, 13, 499},
		{"trailing", 10, 9, 99},
		{"linspace", 1, 0, 0},
		{"compvis", 30, 0, 991},
		{"compvis", 30, 30, 1},
		{"compvis", 50, 49, 1},
	} {
		timesteps, err := Timesteps(of1000(c.spacing), c.steps)
		if err != nil {
			t.Fatal(err)
		}
		if timesteps[c.index] != int64(c.want) {
			t.Errorf("%s, %d steps: timestep %d is %d, want %d", c.spacing, c.steps, c.index, timesteps[c.index], c.want)
		}
	}
	if n := of1000("compvis").StepCount(30); n != 31 {
		t.Errorf("compvis takes %d steps for 30, want 31", n)
	}
	for _, c := range []struct {
		spacing string
		steps   int
		says    string
	}{
		{"trailing", 61, "steps is 61: trailing spacing has timestep -1 at step 61 there, must be 0 to 999"},
		{"trailing", 103, "steps is 103: trailing spacing has timestep -1 at step 103 there, must be 0 to 999"},
		{"compvis", 300, "steps is 300: compvis spacing has timestep 1000 at step 0 there, must be 0 to 999"},
		{"leading", 1000, "steps is 1000: leading spacing has timestep 1000 at step 0 there, must be 0 to 999"},
		{"linspace", 1001, "steps is 1001, must be 1 to 1000"},
		{"linspace", -1, "steps is -1, must be 1 to 1000"},
	} {
		if _, err := Timesteps(of1000(c.spacing), c.steps); err == nil || err.Error() != c.says {
			t.Errorf("%s, %d steps: %v, want %q", c.spacing, c.steps, err, c.says)
		}
	}
}

// Products of alphas agree with diffusers' to a unit or two in the last place of single precision. PyTorch's
// vectorized linspace rounds as the width of the CPU's vectors has it, so that they need not be equal.
func TestAlphasEqualDiffusers(t *testing.T) {
	tables, worst := readSweeps(t).Alphas, 0.0
	if len(tables) < 40 {
		t.Fatalf("%d tables", len(tables))
	}
	for _, table := range tables {
		config := of1000("leading")
		config.StepsOffset = 0
		config.TrainTimesteps, config.BetaSchedule = table.TrainTimesteps, table.BetaSchedule
		config.BetaStart, config.BetaEnd = table.BetaStart, table.BetaEnd
		have, err := AlphasCumprod(config)
		if err != nil {
			t.Fatal(err)
		}
		content, err := base64.StdEncoding.DecodeString(table.Alphas)
		if err != nil {
			t.Fatal(err)
		}
		if len(content) != 4*len(have) {
			t.Fatalf("%s of %d: %d bytes", table.BetaSchedule, table.TrainTimesteps, len(content))
		}
		for i, alpha := range have {
			want := float64(math.Float32frombits(binary.LittleEndian.Uint32(content[4*i:])))
			worst = max(worst, math.Abs(alpha-want))
			if math.Abs(alpha-want) > 2.5e-7 || math.Abs(alpha-want) > 1e-6*want {
				t.Errorf("%s of %d, betas %v to %v: alpha %d is %v, want %v",
					table.BetaSchedule, table.TrainTimesteps, table.BetaStart, table.BetaEnd, i, alpha, want)
			}
		}
	}
	t.Logf("%d tables, largest difference %.1e", len(tables), worst)
}

// A trajectory of a made-up network ends where the reference's does, for every step count of 1000 and every spacing.
// Schedule, prediction, eta and the last alpha take turns.
func TestTrajectoriesOfEveryStepCount(t *testing.T) {
	tables, count, worst := readSweeps(t).Trajectories, 0, 0.0
	if len(tables) != 4 {
		t.Fatalf("%d tables", len(tables))
	}
	for _, table := range tables {
		for i, want := range table.Finals {
			steps := i + 1
			config := of1000(table.Spacing)
			eta := []float64{0, 0.4, 1}[steps/9%3]
			if table.Spacing != "compvis" {
				config.BetaSchedule = []string{"scaled_linear", "linear", "squaredcos_cap_v2"}[steps%3]
				config.Prediction = []string{"epsilon", "v_prediction", "sample"}[steps/3%3]
				config.SetAlphaToOne = steps/27%2 == 0
			}
			list, err := Steps(config, steps, eta)
			if err != nil && want != nil {
				t.Errorf("%s, %d steps: %v", table.Spacing, steps, err)
			}
			if err != nil || want == nil {
				continue // TestTimestepsOfEveryStepCount holds what is refused
			}
			x := []float64{1, 0.5}
			for k, step := range list {
				for i := range x {
					output := 0.3*x[i] + math.Sin(step.Timestep/50+float64(i))
					x[i] = step.Latent*x[i] + step.Output*output + step.Sigma*math.Cos(float64(k)+float64(i))
				}
			}
			relative := math.Hypot(x[0]-want[0], x[1]-want[1]) / math.Hypot(want[0], want[1])
			worst = max(worst, relative)
			if !(relative <= 1e-4) {
				t.Errorf("%s, %s, %s, %d steps, eta %v: %v, want %v (%.1e)",
					config.BetaSchedule, table.Spacing, config.Prediction, steps, eta, x, want, relative)
			}
			count++
		}
	}
	if count < 3000 {
		t.Errorf("only %d trajectories", count)
	}
	t.Logf("%d trajectories, largest relative difference %.1e", count, worst)
}

// One generator drawn from again and again: every size up to 80, short and long draws in any order, seeds of 64 bits.
func TestTorchCPUSizesInAnyOrder(t *testing.T) {
	sequences, draws := readSweeps(t).Noise, 0
	if len(sequences) < 150 {
		t.Fatalf("%d sequences", len(sequences))
	}
	for _, sequence := range sequences {
		seed, err := strconv.ParseUint(sequence.Seed, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		noise := NewTorchCPU(seed)
		for d, size := range sequence.Sizes {
			have := make([]float32, size)
			noise.Draw(have)
			sum := 0.0
			for _, v := range have {
				sum += float64(v)
			}
			want := sequence.FirstLastSum[d]
			if math.Abs(float64(have[0])-want[0]) > 2e-6 || math.Abs(float64(have[size-1])-want[1]) > 2e-6 ||
				math.Abs(sum-want[2]) > 1e-6*(float64(size)+1) {
				t.Errorf("seed %d, draw %d of sizes %v: %v to %v, sum %v, want %v",
					seed, d, sequence.Sizes, have[0], have[size-1], sum, want)
			}
			draws++
		}
	}
	t.Logf("%d generators, %d draws", len(sequences), draws)
}

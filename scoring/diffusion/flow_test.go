package diffusion

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"math"
	"os"
	"strings"
	"testing"
)

// flowCase is a schedule with its steps in ../testdata/flow.json, which make golden writes with diffusers.
type flowCase struct {
	Diffusion Config    `json:"diffusion"`
	Steps     int       `json:"steps"`
	Sigmas    string    `json:"sigmas"` // float32 in base64; "" if diffusers cannot take the steps
	Timesteps string    `json:"timesteps"`
	Variances []float64 `json:"variances"` // of the first step and of step steps/2
	Final     []float64 `json:"final"`
}

func flowCases(t *testing.T) []flowCase {
	t.Helper()
	content, err := os.ReadFile("../testdata/flow.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Flow []flowCase `json:"flow"`
	}
	if err := json.Unmarshal(content, &file); err != nil {
		t.Fatal(err)
	}
	return file.Flow
}

func floats(t *testing.T, text string) []float32 {
	t.Helper()
	content, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	list := make([]float32, len(content)/4)
	for i := range list {
		list[i] = math.Float32frombits(binary.LittleEndian.Uint32(content[4*i:]))
	}
	return list
}

// Sigmas and timesteps are diffusers' to the last bit, for static and dynamic shifts, stretched or not. Steps that
// diffusers cannot take are refused. A trajectory ends where diffusers' does.
func TestFlowEqualsDiffusers(t *testing.T) {
	cases, refused := flowCases(t), 0
	for _, c := range cases {
		sigmas, err := c.Diffusion.Sigmas(c.Steps)
		if c.Sigmas == "" {
			refused++
			if err == nil || !strings.Contains(err.Error(), "steps is ") {
				t.Errorf("%+v, %d steps: %v, error %v", c.Diffusion, c.Steps, sigmas, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%+v, %d steps: %v", c.Diffusion, c.Steps, err)
			continue
		}
		steps, err := Steps(c.Diffusion, c.Steps, 0)
		if err != nil {
			t.Fatal(err)
		}
		wantSigmas, wantTimes := floats(t, c.Sigmas), floats(t, c.Timesteps)
		for i, want := range wantSigmas {
			if float32(sigmas[i]) != want {
				t.Errorf("%+v, %d steps: sigma %d is %.9g, want %.9g", c.Diffusion, c.Steps, i, sigmas[i], want)
			}
		}
		x := []float64{1, 0.5, 0, -0.5}
		for k, step := range steps {
			if float32(step.Timestep) != wantTimes[k] {
				t.Errorf("%+v, %d steps: timestep %d is %.9g, want %.9g", c.Diffusion, c.Steps, k, step.Timestep, wantTimes[k])
			}
			for i := range x {
				output := 0.3*x[i] + math.Sin(step.Timestep/50+float64(i))
				x[i] = step.Latent*x[i] + step.Output*output
			}
		}
		for i, want := range c.Final {
			if math.Abs(x[i]-want) > 2e-6*float64(c.Steps+10) { // diffusers adds up in single precision
				t.Errorf("%+v, %d steps: ends at %v, want %v", c.Diffusion, c.Steps, x, c.Final)
				break
			}
		}
		for j, k := range []int{0, c.Steps / 2} {
			have := steps[k].PosteriorSigma * steps[k].PosteriorSigma
			if math.Abs(have-c.Variances[j]) > 1e-9 {
				t.Errorf("%+v, %d steps: variance of step %d is %v, want %v", c.Diffusion, c.Steps, k, have, c.Variances[j])
			}
		}
	}
	if len(cases) < 100 || refused == 0 {
		t.Errorf("%d cases, %d refused", len(cases), refused)
	}
}

// x0 and the noise of a step are those of x = (1 - sigma) x0 + sigma noise: a backbone that knows both leads there.
func TestFlowPredictsTheOrigin(t *testing.T) {
	config := flowCases(t)[0].Diffusion
	sigmas, err := config.Sigmas(5)
	if err != nil {
		t.Fatal(err)
	}
	steps, err := Steps(config, 5, 0)
	if err != nil {
		t.Fatal(err)
	}
	const origin, noise = 0.7, -1.3
	for i, step := range steps {
		x, velocity := (1-sigmas[i])*origin+sigmas[i]*noise, noise-origin
		if have := step.X0Latent*x + step.X0Output*velocity; math.Abs(have-origin) > 1e-6 {
			t.Errorf("step %d predicts %v, want %v", i, have, origin)
		}
		want := (1-sigmas[i+1])*origin + sigmas[i+1]*noise
		if have := step.Latent*x + step.Output*velocity; math.Abs(have-want) > 1e-6 {
			t.Errorf("step %d leads to %v, want %v", i, have, want)
		}
	}
	if _, err := Steps(config, 5, 0.5); err == nil || !strings.Contains(err.Error(), "eta is 0.5, must be 0") {
		t.Errorf("eta 0.5: %v", err)
	}
}

func TestFlowOutOfBounds(t *testing.T) {
	for _, c := range []struct {
		want   string
		change func(*Config)
	}{
		{"kind is \"flow\"", func(c *Config) { c.Kind = "flow" }},
		{"train_timesteps is 0", func(c *Config) { c.TrainTimesteps = 0 }},
		{"prediction is \"epsilon\"", func(c *Config) { c.Prediction = "epsilon" }},
		{"timestep_spacing is \"leading\"", func(c *Config) { c.TimestepSpacing = "leading" }},
		{"shift is 0", func(c *Config) { c.Shift = 0 }},
		{"shift is NaN", func(c *Config) { c.Shift = math.NaN() }},
		{"shift is +Inf", func(c *Config) { c.Shift = math.Inf(1) }},
		{"base_shift is NaN", func(c *Config) { c.BaseShift = math.NaN() }},
		{"max_shift is +Inf", func(c *Config) { c.MaxShift = math.Inf(1) }},
		{"base_image_seq_len 0", func(c *Config) { c.BaseImageSeqLen = 0 }},
		{"max_image_seq_len 256", func(c *Config) { c.MaxImageSeqLen = 256 }},
		{"image_seq_len is 0", func(c *Config) { c.ImageSeqLen = 0 }},
		{"time_shift_type is \"cosine\"", func(c *Config) { c.TimeShiftType = "cosine" }},
		{"shift_terminal is 1", func(c *Config) { c.ShiftTerminal = 1 }},
		{"shift_terminal is -0.1", func(c *Config) { c.ShiftTerminal = -0.1 }},
		{"mu is -", func(c *Config) { c.UseDynamicShifting, c.TimeShiftType, c.BaseShift = true, "linear", -900 }},
	} {
		config := flowCases(t)[0].Diffusion
		config.ImageSeqLen = 300
		c.change(&config)
		if err := config.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error is %v, want %s", err, c.want)
		}
		if _, err := Steps(config, 4, 0); err == nil {
			t.Errorf("%s: steps were made", c.want)
		}
	}
}

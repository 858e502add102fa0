// Package diffusion holds the arithmetic of the sampler: noise schedules, timesteps, the updates of DDIM and of flow
// matching, and seeded noise, with the conventions of PyTorch and of diffusers' DDIMScheduler and
// FlowMatchEulerDiscreteScheduler.
package diffusion

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// samplerNames are the names of samplers in lower case: our own, and the classes of diffusers and CompVis.
var samplerNames = map[string][]string{
	KindDDIM:      {KindDDIM, "ddimscheduler", "ddimsampler"},
	KindFlowMatch: {KindFlowMatch, "flowmatcheulerdiscretescheduler"},
}

// Config is a forward process and the way a sampler chooses its timesteps. It is the manifest's diffusion object.
// Fields with a tag kind are those of one kind of process only.
type Config struct {
	Kind            string  `json:"kind,omitempty" format:"2"`    // ddim, or flow_match; "" is ddim
	TrainTimesteps  int     `json:"train_timesteps"`              // T
	BetaSchedule    string  `json:"beta_schedule" kind:"ddim"`    // scaled_linear, linear or squaredcos_cap_v2
	BetaStart       float64 `json:"beta_start" kind:"ddim"`       // of scaled_linear and linear
	BetaEnd         float64 `json:"beta_end" kind:"ddim"`         //
	Prediction      string  `json:"prediction"`                   // epsilon, v_prediction or sample; velocity of a flow
	TimestepSpacing string  `json:"timestep_spacing"`             // leading, trailing, linspace or compvis
	StepsOffset     int     `json:"steps_offset" kind:"ddim"`     // added to leading timesteps; compvis has 1
	SetAlphaToOne   bool    `json:"set_alpha_to_one" kind:"ddim"` // the last step goes to alpha 1, not to the first one
	Flow
}

// Sampler returns the name of the sampler that runs the process backward.
func (c Config) Sampler() string {
	if c.Kind == KindFlowMatch {
		return KindFlowMatch
	}
	return KindDDIM
}

// KnownKind reports whether there is a kind of this name.
func KnownKind(kind string) bool { return samplerNames[kind] != nil }

// SamplerNames returns the names, in lower case, by which producers call this sampler.
func (c Config) SamplerNames() []string { return samplerNames[c.Sampler()] }

// maxTrainTimesteps bounds the tables that a configuration makes us compute.
const maxTrainTimesteps = 100_000

// Validate returns an error that names the first field out of its bounds.
func (c Config) Validate() error {
	if c.TrainTimesteps < 1 || c.TrainTimesteps > maxTrainTimesteps {
		return fmt.Errorf("train_timesteps is %d, must be 1 to %d", c.TrainTimesteps, maxTrainTimesteps)
	}
	switch c.Kind {
	case "", KindDDIM:
		return c.validateDDIM()
	case KindFlowMatch:
		if err := oneOf("prediction", c.Prediction, velocity); err != nil {
			return err
		}
		if err := oneOf("timestep_spacing", c.TimestepSpacing, "linspace", "trailing"); err != nil {
			return err
		}
		return c.Flow.validate()
	}
	return oneOf("kind", c.Kind, KindDDIM, KindFlowMatch)
}

// validateDDIM returns an error that names the first field of DDIM out of its bounds.
func (c Config) validateDDIM() error {
	if c.StepsOffset < 0 || c.StepsOffset >= c.TrainTimesteps {
		return fmt.Errorf("steps_offset is %d, must be 0 to %d", c.StepsOffset, c.TrainTimesteps-1)
	}
	for _, f := range []struct {
		name, value string
		allowed     []string
	}{
		{"beta_schedule", c.BetaSchedule, []string{"scaled_linear", "linear", "squaredcos_cap_v2"}},
		{"prediction", c.Prediction, []string{"epsilon", "v_prediction", "sample"}},
		{"timestep_spacing", c.TimestepSpacing, []string{"leading", "trailing", "linspace", "compvis"}},
	} {
		if err := oneOf(f.name, f.value, f.allowed...); err != nil {
			return err
		}
	}
	if !(c.BetaStart > 0 && c.BetaStart < c.BetaEnd && c.BetaEnd < 1) {
		return fmt.Errorf("beta_start %v and beta_end %v must be 0 < beta_start < beta_end < 1", c.BetaStart, c.BetaEnd)
	}
	if c.TimestepSpacing == "compvis" && c.StepsOffset != 1 {
		return fmt.Errorf("steps_offset is %d, must be 1 with timestep_spacing compvis", c.StepsOffset)
	}
	if c.TimestepSpacing == "compvis" && c.SetAlphaToOne {
		return errors.New("set_alpha_to_one is true, must be false with timestep_spacing compvis")
	}
	return nil
}

func oneOf(name, value string, allowed ...string) error {
	if slices.Contains(allowed, value) {
		return nil
	}
	return fmt.Errorf("%s is %q, must be one of %s", name, value, strings.Join(allowed, ", "))
}

// StepCount returns how many steps a sampler takes that was asked for the given number: the same number, except with
// compvis spacing. A sampler of CompVis that is asked for 30 of 1000 steps takes 31.
func (c Config) StepCount(steps int) int {
	if c.TimestepSpacing != "compvis" || steps < 1 || steps > c.TrainTimesteps {
		return steps
	}
	stride := c.TrainTimesteps / steps
	return (c.TrainTimesteps + stride - 1) / stride
}

// Step is one step of DDIM or of a flow, as a linear combination of the latent and the backbone's output:
//
//	mean  = Latent*x + Output*output
//	x_prev = mean + Sigma*noise
type Step struct {
	Timestep float64 // given to the backbone: whole for DDIM
	Latent   float64
	Output   float64
	Sigma    float64 // of the step; 0 if eta is 0
	// PosteriorSigma is Sigma at eta 1, the ancestral sampler's. Distances that need a variance use it if eta is 0.
	PosteriorSigma float64
	X0Latent       float64 // x0 = X0Latent*x + X0Output*output
	X0Output       float64
}

// Origin returns the step that goes to the predicted x0 instead of the mean.
func (s Step) Origin() Step {
	return Step{Timestep: s.Timestep, Latent: s.X0Latent, Output: s.X0Output, X0Latent: s.X0Latent, X0Output: s.X0Output}
}

// AlphasCumprod returns the products of 1-beta up to each training timestep, float64[T].
//
// scaled_linear spaces the square roots of beta linearly (Rombach et al. 2022), linear spaces beta linearly (Ho et al.
// 2020), squaredcos_cap_v2 is the cosine schedule of Nichol and Dhariwal (2021) with beta at most 0.999. Betas, alphas
// and their products are rounded to single precision as diffusers keeps them: near the image 1-alpha loses digits, and
// the producer's sampler loses the same ones.
func AlphasCumprod(c Config) ([]float64, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Kind == KindFlowMatch {
		return nil, fmt.Errorf("kind is %q, must be %s", c.Kind, KindDDIM)
	}
	cosine := func(t float64) float64 {
		v := math.Cos((t + 0.008) / 1.008 * math.Pi / 2)
		return v * v
	}
	n := float64(c.TrainTimesteps)
	at := func(i int, from, to float64) float64 {
		if c.TrainTimesteps == 1 {
			return from
		}
		return from + (to-from)*float64(i)/(n-1)
	}
	alphas := make([]float64, c.TrainTimesteps)
	product := 1.0
	for i := range alphas {
		var beta float64
		switch c.BetaSchedule {
		case "scaled_linear":
			root := single(at(i, math.Sqrt(c.BetaStart), math.Sqrt(c.BetaEnd)))
			beta = root * root
		case "linear":
			beta = at(i, c.BetaStart, c.BetaEnd)
		case "squaredcos_cap_v2":
			beta = math.Min(1-cosine((float64(i)+1)/n)/cosine(float64(i)/n), 0.999)
		}
		product *= single(1 - single(beta))
		alphas[i] = single(product)
	}
	return alphas, nil
}

// single rounds to single precision.
func single(v float64) float64 { return float64(float32(v)) }

// root is the square root in single precision.
func root(v float64) float64 { return single(math.Sqrt(v)) }

// Timesteps returns the timesteps of a sampler that is asked for the given number of steps, in the order in which they
// run, from noise to image. There are StepCount of them.
//
// leading, trailing and linspace are diffusers' and round as numpy does, see trailing and linspace. compvis is what
// the DDIM sampler of CompVis' latent diffusion takes: range(0, T, T/S) + 1.
//
// The error says why a sampler cannot take this many steps: its timesteps would lie outside 0 to T-1. diffusers has
// such step counts with trailing spacing, for example 61 of 1000. There it takes one step more than it was asked for,
// at timestep -1, which Python reads as the last one. CompVis fails with an index error, for example for 300 of 1000.
//
// Reference: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), table 2.
func Timesteps(c Config, steps int) ([]int64, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Kind == KindFlowMatch {
		return nil, fmt.Errorf("kind is %q, must be %s", c.Kind, KindDDIM)
	}
	if steps < 1 || steps > c.TrainTimesteps {
		return nil, fmt.Errorf("steps is %d, must be 1 to %d", steps, c.TrainTimesteps)
	}
	var timesteps []int64
	switch c.TimestepSpacing {
	case "leading":
		timesteps = multiples(steps, c.TrainTimesteps/steps, c.StepsOffset)
	case "compvis":
		timesteps = multiples(c.StepCount(steps), c.TrainTimesteps/steps, 1)
	case "trailing":
		timesteps = trailing(c.TrainTimesteps, steps)
	case "linspace":
		timesteps = linspace(c.TrainTimesteps, steps)
	}
	for i, t := range timesteps {
		if t < 0 || t >= int64(c.TrainTimesteps) {
			return nil, fmt.Errorf("steps is %d: %s spacing has timestep %d at step %d there, must be 0 to %d",
				steps, c.TimestepSpacing, t, i, c.TrainTimesteps-1)
		}
	}
	return timesteps, nil
}

// multiples returns offset plus the multiples of stride below count*stride, in descending order.
func multiples(count, stride, offset int) []int64 {
	timesteps := make([]int64, count)
	for i := range timesteps {
		timesteps[i] = int64((count-1-i)*stride + offset)
	}
	return timesteps
}

// trailing returns numpy.round(numpy.arange(T, 0, -T/S)) - 1. numpy's arange computes its length by a division, keeps
// the difference of its first two elements as the stride, and multiplies. All three round: a value that should be
// half-way between two integers can lie on either side, and the last value can be a hair above 0 instead of at 0.
//
// The conversions to float64 keep a compiler from fusing a product with a sum, which would round once instead of
// twice.
func trailing(train, steps int) []int64 {
	start := float64(train)
	step := -(start / float64(steps))
	stride := float64(start+step) - start
	timesteps := make([]int64, int(math.Ceil(-start/step)))
	for i := range timesteps {
		timesteps[i] = int64(math.RoundToEven(start+float64(float64(i)*stride))) - 1
	}
	return timesteps
}

// linspace returns numpy.linspace(0, T-1, S).round() in descending order. numpy multiplies by a rounded stride and
// puts the end at its exact value.
func linspace(train, steps int) []int64 {
	timesteps := make([]int64, steps)
	if steps == 1 {
		return timesteps
	}
	timesteps[0] = int64(train - 1)
	stride := float64(train-1) / float64(steps-1)
	for i := 1; i < steps; i++ {
		timesteps[i] = int64(math.RoundToEven(float64(steps-1-i) * stride))
	}
	return timesteps
}

// Steps returns the steps of DDIM with the given eta (0 to 1), in the order in which they run. There are StepCount of
// them.
//
// With a the cumulative alpha of a timestep and a' that of T/S timesteps before it, equation 12 of Song et al.,
// "Denoising Diffusion Implicit Models" (2021), reads
//
//	x0     = (x - sqrt(1-a) eps) / sqrt(a)
//	sigma  = eta sqrt((1-a')/(1-a)) sqrt(1 - a/a')
//	mean   = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps
//
// where eps and x0 follow from the output: eps itself (epsilon), v = sqrt(a) eps - sqrt(1-a) x0 (v_prediction), or x0
// (sample). All are linear in x and the output, so a step is two numbers. x0 is never clipped.
// Roots and differences of alphas are rounded to single precision one by one, as diffusers computes them.
//
// A flow takes the steps of flowSteps.
func Steps(c Config, steps int, eta float64) ([]Step, error) {
	if c.Kind == KindFlowMatch {
		return flowSteps(c, steps, eta)
	}
	alphas, err := AlphasCumprod(c)
	if err != nil {
		return nil, err
	}
	timesteps, err := Timesteps(c, steps)
	if err != nil {
		return nil, err
	}
	if !(eta >= 0 && eta <= 1) {
		return nil, fmt.Errorf("eta is %v, must be 0 to 1", eta)
	}
	final := alphas[0]
	if c.SetAlphaToOne {
		final = 1
	}
	result := make([]Step, len(timesteps))
	for i, t := range timesteps {
		a, previous := alphas[t], final
		if p := t - int64(c.TrainTimesteps/steps); p >= 0 {
			previous = alphas[p]
		}
		posterior := root(single(single(single(1-previous)/single(1-a)) * max(0, single(1-single(a/previous)))))
		sigma := single(single(eta) * posterior)
		direction := root(max(0, single(single(1-previous)-single(sigma*sigma)))) // factor of eps
		signal := root(previous)                                                  // factor of x0
		rootA, rootB := root(a), root(single(1-a))
		s := Step{Timestep: float64(t), Sigma: sigma, PosteriorSigma: posterior}
		switch c.Prediction {
		case "epsilon": // x0 = x/rootA - rootB/rootA out, eps = out
			s.Latent = signal / rootA
			s.Output = direction - signal*rootB/rootA
			s.X0Latent, s.X0Output = 1/rootA, -rootB/rootA
		case "v_prediction": // x0 = rootA x - rootB out, eps = rootA out + rootB x
			s.Latent = signal*rootA + direction*rootB
			s.Output = direction*rootA - signal*rootB
			s.X0Latent, s.X0Output = rootA, -rootB
		case "sample": // x0 = out, eps = (x - rootA out)/rootB
			s.Latent = direction / rootB
			s.Output = signal - direction*rootA/rootB
			s.X0Output = 1
		}
		// A product of alphas that rounds to 0 or 1 leaves nothing to divide by.
		if sum := s.Latent + s.Output + s.PosteriorSigma + s.X0Latent + s.X0Output; math.IsNaN(sum) || math.IsInf(sum, 0) {
			return nil, fmt.Errorf("steps is %d: the betas leave alphas_cumprod %v at timestep %d, no step can start there",
				steps, a, t)
		}
		result[i] = s
	}
	return result, nil
}

// Mean writes the mean of the step to dst, which may be x, and reports whether every element is finite. If
// unconditional is nil, the output is the conditional one. Else classifier-free guidance (Ho and Salimans 2022)
// combines both: unconditional + guidance*(conditional - unconditional). All slices have the length of dst.
func (s Step) Mean(dst, x, conditional, unconditional []float32, guidance float64) bool {
	n := len(dst)
	x, conditional = x[:n], conditional[:n]
	sum := 0.0
	if unconditional == nil {
		for i := range dst {
			mean := s.Latent*float64(x[i]) + s.Output*float64(conditional[i])
			dst[i] = float32(mean)
			sum += float64(dst[i])
		}
	} else {
		unconditional = unconditional[:n]
		// Two factors of the outputs instead of guidance and Output apart.
		c, u := s.Output*guidance, s.Output*(1-guidance)
		for i := range dst {
			mean := s.Latent*float64(x[i]) + c*float64(conditional[i]) + u*float64(unconditional[i])
			dst[i] = float32(mean)
			sum += float64(dst[i])
		}
	}
	// A sum of float32 numbers cannot overflow float64: it is finite if and only if all of them are.
	return !math.IsNaN(sum) && !math.IsInf(sum, 0)
}

// AddNoise adds Sigma*noise to x.
func (s Step) AddNoise(x, noise []float32) {
	for i := range x {
		x[i] = float32(float64(x[i]) + s.Sigma*float64(noise[i]))
	}
}

// Package diffusion holds the arithmetic of the sampler: noise schedules, timesteps, the DDIM update and seeded noise,
// with the conventions of diffusers' DDIMScheduler and of PyTorch.
package diffusion

import (
	"fmt"
	"math"
)

// Config is a forward process and the way its timesteps are chosen.
type Config struct {
	TrainTimesteps  int     // T
	BetaSchedule    string  // scaled_linear, linear or squaredcos_cap_v2
	BetaStart       float64 // of scaled_linear and linear
	BetaEnd         float64
	Prediction      string // epsilon, v_prediction or sample
	TimestepSpacing string // leading, trailing or linspace
	StepsOffset     int    // added to the timesteps of leading spacing
	SetAlphaToOne   bool   // the last step goes to alpha 1 instead of the first training alpha
}

// Step is one DDIM step, as a linear combination of the latent and the backbone's output:
//
//	mean  = Latent*x + Output*output
//	x_prev = mean + Sigma*noise
type Step struct {
	Timestep int64 // given to the backbone
	Latent   float64
	Output   float64
	Sigma    float64 // of the step; 0 where eta is 0
	// PosteriorSigma is Sigma at eta 1, the ancestral sampler's. Distances that need a variance take it where eta is 0.
	PosteriorSigma float64
}

// AlphasCumprod returns the products of 1-beta up to each training timestep, float64[T].
//
// scaled_linear spaces the square roots of beta linearly (Rombach et al. 2022), linear spaces beta linearly (Ho et al.
// 2020), squaredcos_cap_v2 is the cosine schedule of Nichol and Dhariwal (2021) with beta at most 0.999. Betas, alphas and
// their products are rounded to single precision as diffusers keeps them: near the image 1-alpha loses digits, and the
// producer's sampler loses the same ones.
func AlphasCumprod(c Config) ([]float64, error) {
	if c.TrainTimesteps < 1 {
		return nil, fmt.Errorf("train_timesteps is %d, must be positive", c.TrainTimesteps)
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
		default:
			return nil, fmt.Errorf("beta_schedule %q is unknown", c.BetaSchedule)
		}
		product *= single(1 - single(beta))
		alphas[i] = single(product)
	}
	return alphas, nil
}

// single rounds to single precision.
func single(v float64) float64 { return float64(float32(v)) }

// Timesteps returns the S timesteps of a sampler in the order in which they run, from noise to image.
//
// Reference: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), table 2.
func Timesteps(c Config, steps int) ([]int64, error) {
	if steps < 1 || steps > c.TrainTimesteps {
		return nil, fmt.Errorf("steps is %d, must be 1 to %d", steps, c.TrainTimesteps)
	}
	timesteps := make([]int64, steps)
	for i := range timesteps {
		var t int64
		switch c.TimestepSpacing {
		case "leading":
			t = int64((steps-1-i)*(c.TrainTimesteps/steps) + c.StepsOffset)
		case "trailing":
			t = int64(math.RoundToEven(float64(c.TrainTimesteps)-float64(i)*float64(c.TrainTimesteps)/float64(steps))) - 1
		case "linspace":
			if steps > 1 {
				t = int64(math.RoundToEven(float64(steps-1-i) * float64(c.TrainTimesteps-1) / float64(steps-1)))
			}
		default:
			return nil, fmt.Errorf("timestep_spacing %q is unknown", c.TimestepSpacing)
		}
		// Leading spacing with an offset can pass the last training timestep.
		if t < 0 || t >= int64(c.TrainTimesteps) {
			return nil, fmt.Errorf("step %d of %d has timestep %d, training has 0 to %d", i, steps, t, c.TrainTimesteps-1)
		}
		timesteps[i] = t
	}
	return timesteps, nil
}

// Steps returns the S steps of DDIM with the given eta (0 to 1), in the order in which they run.
//
// With a the cumulative alpha of a timestep and a' that of T/S timesteps before it, equation 12 of Song et al., "Denoising
// Diffusion Implicit Models" (2021), reads
//
//	x0     = (x - sqrt(1-a) eps) / sqrt(a)
//	sigma  = eta sqrt((1-a')/(1-a)) sqrt(1 - a/a')
//	mean   = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps
//
// where eps and x0 follow from the output: eps itself (epsilon), v = sqrt(a) eps - sqrt(1-a) x0 (v_prediction), or x0
// (sample). All are linear in x and the output, so a step is two numbers. x0 is never clipped.
func Steps(c Config, steps int, eta float64) ([]Step, error) {
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
	result := make([]Step, steps)
	for i, t := range timesteps {
		a, previous := alphas[t], final
		if p := t - int64(c.TrainTimesteps/steps); p >= 0 {
			previous = alphas[p]
		}
		posterior := math.Sqrt((1 - previous) / (1 - a) * max(0, 1-a/previous))
		sigma := eta * posterior
		direction := math.Sqrt(max(0, 1-previous-sigma*sigma)) // factor of eps
		signal := math.Sqrt(previous)                          // factor of x0
		rootA, rootB := math.Sqrt(a), math.Sqrt(1-a)
		s := Step{Timestep: t, Sigma: sigma, PosteriorSigma: posterior}
		switch c.Prediction {
		case "epsilon": // x0 = x/rootA - rootB/rootA out, eps = out
			s.Latent = signal / rootA
			s.Output = direction - signal*rootB/rootA
		case "v_prediction": // x0 = rootA x - rootB out, eps = rootA out + rootB x
			s.Latent = signal*rootA + direction*rootB
			s.Output = direction*rootA - signal*rootB
		case "sample": // x0 = out, eps = (x - rootA out)/rootB
			s.Latent = direction / rootB
			s.Output = signal - direction*rootA/rootB
		default:
			return nil, fmt.Errorf("prediction %q is unknown", c.Prediction)
		}
		result[i] = s
	}
	return result, nil
}

// Mean writes the mean of the step to dst, which may be x, and reports whether every element is finite. Where
// unconditional is nil the output is the conditional one; otherwise classifier-free guidance (Ho and Salimans 2022)
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
	// A sum of float32 numbers cannot overflow float64: it is finite exactly where all of them are.
	return !math.IsNaN(sum) && !math.IsInf(sum, 0)
}

// AddNoise adds Sigma*noise to x.
func (s Step) AddNoise(x, noise []float32) {
	for i := range x {
		x[i] = float32(float64(x[i]) + s.Sigma*float64(noise[i]))
	}
}

package diffusion

import (
	"fmt"
	"math"
)

// Kinds of forward processes.
const (
	KindDDIM      = "ddim"       // noise is mixed in by alphas_cumprod; also what a manifest without a kind means
	KindFlowMatch = "flow_match" // x = (1 - sigma) x0 + sigma noise; the backbone predicts noise - x0
)

// velocity is the only prediction of flow matching: the direction from the image to the noise.
const velocity = "velocity"

// maxShift bounds the shifts of a schedule, which stay below 20 in published models.
const maxShift = 1000

// Flow are the fields of a flow-matching schedule, with the names and meanings of diffusers'
// FlowMatchEulerDiscreteScheduler.
type Flow struct {
	// Shift is static: sigma becomes s sigma / (1 + (s - 1) sigma).
	Shift              float64 `json:"shift" kind:"flow_match"`
	UseDynamicShifting bool    `json:"use_dynamic_shifting" kind:"flow_match"` // shift by mu, see Mu, in place of Shift
	BaseShift          float64 `json:"base_shift" kind:"flow_match"`           // mu at base_image_seq_len
	MaxShift           float64 `json:"max_shift" kind:"flow_match"`            // mu at max_image_seq_len
	BaseImageSeqLen    int     `json:"base_image_seq_len" kind:"flow_match"`
	MaxImageSeqLen     int     `json:"max_image_seq_len" kind:"flow_match"`
	// ImageSeqLen is how many tokens the transformer makes of a latent: height/patch times width/patch.
	ImageSeqLen   int     `json:"image_seq_len" kind:"flow_match"`
	TimeShiftType string  `json:"time_shift_type" kind:"flow_match"` // exponential or linear; of dynamic shifting
	ShiftTerminal float64 `json:"shift_terminal" kind:"flow_match"`  // the last sigma after a stretch; 0 stretches nothing
}

// validate returns an error that names the first field out of its bounds.
func (f Flow) validate() error {
	for _, s := range []struct {
		name        string
		value       float64
		least, most float64
	}{
		{"base_shift", f.BaseShift, -maxShift, maxShift},
		{"max_shift", f.MaxShift, -maxShift, maxShift},
	} {
		if !(s.value >= s.least && s.value <= s.most) {
			return fmt.Errorf("%s is %v, must be %v to %v", s.name, s.value, s.least, s.most)
		}
	}
	if !(f.Shift > 0 && f.Shift <= maxShift) {
		return fmt.Errorf("shift is %v, must be above 0, at most %d", f.Shift, maxShift)
	}
	if !(f.ShiftTerminal >= 0 && f.ShiftTerminal < 1) {
		return fmt.Errorf("shift_terminal is %v, must be at least 0 and below 1", f.ShiftTerminal)
	}
	if f.BaseImageSeqLen < 1 || f.MaxImageSeqLen <= f.BaseImageSeqLen {
		return fmt.Errorf("base_image_seq_len %d and max_image_seq_len %d must be "+
			"1 <= base_image_seq_len < max_image_seq_len", f.BaseImageSeqLen, f.MaxImageSeqLen)
	}
	if f.ImageSeqLen < 1 {
		return fmt.Errorf("image_seq_len is %d, must be at least 1", f.ImageSeqLen)
	}
	if err := oneOf("time_shift_type", f.TimeShiftType, "exponential", "linear"); err != nil {
		return err
	}
	if f.UseDynamicShifting && f.TimeShiftType == "linear" && f.Mu() <= 0 {
		return fmt.Errorf("image_seq_len is %d: mu is %v there, must be positive with time_shift_type linear", f.ImageSeqLen,
			f.Mu())
	}
	return nil
}

// Mu returns the shift that dynamic shifting takes for the latent's size: on the line through (base_image_seq_len,
// base_shift) and (max_image_seq_len, max_shift), as the pipelines of diffusers compute it.
func (f Flow) Mu() float64 {
	slope := (f.MaxShift - f.BaseShift) / float64(f.MaxImageSeqLen-f.BaseImageSeqLen)
	offset := f.BaseShift - float64(slope*float64(f.BaseImageSeqLen))
	return float64(float64(f.ImageSeqLen)*slope) + offset
}

// Sigmas returns the noise levels of the given number of Euler steps, from 1 or below to 0: steps + 1 of them.
//
// Spacing linspace is the scheduler's own, from the greatest to the least training sigma. With a static shift these are
// shifted when the scheduler is made and once more here, as in diffusers. Spacing trailing is what the pipelines of
// FLUX and others pass: 1, 1 - 1/S, ..., 1/S. Those are single precision before they are shifted; the others are double
// precision, and rounded after.
func (c Config) Sigmas(steps int) ([]float64, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Kind != KindFlowMatch {
		return nil, fmt.Errorf("kind is %q, must be %s", c.Kind, KindFlowMatch)
	}
	if steps < 1 || steps > c.TrainTimesteps {
		return nil, fmt.Errorf("steps is %d, must be 1 to %d", steps, c.TrainTimesteps)
	}
	sigmas := c.unshifted(steps)
	round := func(v float64) float64 { return v }
	if c.TimestepSpacing == "trailing" {
		round = single
	}
	for i, s := range sigmas {
		sigmas[i] = c.Flow.shifted(round(s), c.UseDynamicShifting, round)
	}
	if c.ShiftTerminal > 0 {
		scale := round(round(1-sigmas[steps-1]) / round(1-c.ShiftTerminal))
		for i, s := range sigmas {
			sigmas[i] = round(1 - round(round(1-s)/scale))
		}
	}
	sigmas = append(sigmas, 0)
	for i := range sigmas {
		sigmas[i] = single(sigmas[i])
		if !(sigmas[i] >= 0 && sigmas[i] <= 1) || i > 0 && !(sigmas[i] < sigmas[i-1]) {
			return nil, fmt.Errorf("steps is %d: the schedule has sigma %v at step %d, must descend from at most 1 to 0", steps,
				sigmas[i], i)
		}
	}
	return sigmas, nil
}

// unshifted returns the sigmas of a sampler before Sigmas shifts them.
func (c Config) unshifted(steps int) []float64 {
	train := float64(c.TrainTimesteps)
	from, to := 1.0, single(1/train)
	switch {
	case c.TimestepSpacing == "trailing":
		to = 1 / float64(steps)
	case !c.UseDynamicShifting:
		from, to = c.Flow.shifted(from, false, single), c.Flow.shifted(to, false, single)
	}
	sigmas := make([]float64, steps)
	if c.TimestepSpacing == "trailing" {
		for i := range sigmas {
			sigmas[i] = lerp(from, to, i, steps)
		}
		return sigmas
	}
	for i := range sigmas {
		sigmas[i] = lerp(float64(from*train), float64(to*train), i, steps) / train
	}
	return sigmas
}

// lerp returns element i of numpy.linspace(from, to, n).
func lerp(from, to float64, i, n int) float64 {
	if n > 1 && i == n-1 {
		return to
	}
	if n == 1 {
		return from
	}
	return float64(float64(i)*((to-from)/float64(n-1))) + from
}

// shifted returns a shifted sigma; round is applied to every operation.
func (f Flow) shifted(sigma float64, dynamic bool, round func(float64) float64) float64 {
	if !dynamic {
		return round(round(round(f.Shift)*sigma) / round(1+round(round(f.Shift-1)*sigma)))
	}
	mu := f.Mu()
	if f.TimeShiftType == "exponential" {
		mu = math.Exp(mu)
	}
	mu = round(mu)
	return round(mu / round(mu+round(round(1/sigma)-1)))
}

// flowSteps returns the Euler steps of the probability-flow ODE: x' = x + (sigma' - sigma) v.
//
// With v = noise - x0 and x = (1 - sigma) x0 + sigma noise, x0 = x - sigma v. PosteriorSigma is the standard deviation
// of x' given x and x0 in the Markov process with these marginals (Kingma et al., "Variational Diffusion Models", 2021,
// appendix A): with r = (1 - sigma)/(1 - sigma'), it is sigma'/sigma sqrt(sigma^2 - r^2 sigma'^2).
func flowSteps(c Config, steps int, eta float64) ([]Step, error) {
	if eta != 0 {
		return nil, fmt.Errorf("eta is %v, must be 0 with kind %s", eta, KindFlowMatch)
	}
	sigmas, err := c.Sigmas(steps)
	if err != nil {
		return nil, err
	}
	result := make([]Step, steps)
	for i := range result {
		sigma, next := sigmas[i], sigmas[i+1]
		ratio := (1 - sigma) / (1 - next)
		result[i] = Step{
			Timestep: single(sigma * single(float64(c.TrainTimesteps))), Latent: 1, Output: single(next - sigma),
			PosteriorSigma: next / sigma * math.Sqrt(max(0, sigma*sigma-ratio*ratio*next*next)),
			X0Latent:       1, X0Output: -sigma,
		}
	}
	return result, nil
}

package scoring

import (
	"context"
	"slices"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Rollout is the end of a request if each component alone carries it through all steps.
type Rollout struct {
	Latents   [][]float32 // final latents by component, [M][channels*height*width]
	Reference []float32   // under the backbone's own fully trained table; nil if the ensemble has no such table
	Rows      int         // rows of U-Net work
}

// Rollout carries a request from its first latent to the end under each component's table, and under the backbone's
// fully trained table if the ensemble has it. It uses the sampler of the request's profile, not its measurements.
// Evaluations compare scores with it. Errors are the same as for Score.
func (e *Engine) Rollout(ctx context.Context, r Request) (Rollout, error) {
	profile := e.profile(r)
	whole := wholeRollout(e.ensemble.Diffusion, profile.RequestRisk.Steps)
	profile.ClassGap, profile.RequestRisk = whole, whole
	components := e.ensemble.Components
	if e.ensemble.Tables(ensemble.TablesReference) != nil {
		components++ // the component after the last is the reference: see embedding
	}
	p, err := e.compile(components, profile, whole)
	if err != nil {
		return Rollout{}, err
	}
	t, _, err := e.run(ctx, r, p, profile)
	if err != nil {
		return Rollout{}, err
	}
	defer e.sampler.release(t)
	out := Rollout{Rows: p.rows}
	for component, mean := range t.means[0] {
		if latent := slices.Clone(mean); component < e.ensemble.Components {
			out.Latents = append(out.Latents, latent)
		} else {
			out.Reference = latent
		}
	}
	return out, nil
}

// embedding returns the class embedding of a component; the component after the last is the reference table.
func (s *sampler) embedding(component, class int) []float32 {
	if component == s.ensemble.Components {
		return s.ensemble.Tables(ensemble.TablesReference).Row(0, class)
	}
	return s.ensemble.Members().Row(component, class)
}

// wholeRollout measures the members after all steps of a sampler that is asked for steps, each on its own path.
func wholeRollout(d Diffusion, steps int) Measure {
	return Measure{Tables: ensemble.TablesMembers, Steps: steps, Guidance: ensemble.GuidanceOwn,
		RolloutSteps: d.StepCount(steps), Estimator: ensemble.MeanW2}
}

package scoring

import (
	"context"
	"fmt"
	"slices"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Rollout is where a request ends when every component alone carries it through all steps.
type Rollout struct {
	Latents   [][]float32 // final latents by component, [M][channels*height*width]
	Reference []float32   // under the backbone's own fully trained table; nil where the ensemble carries none
	Rows      int         // rows of U-Net work
}

// Rollout carries a request from its first latent to the end under each component's own table and, where the ensemble
// carries it, under the backbone's fully trained one. Of the request's profile only the sampler counts. It is what an
// evaluation holds scores against. Errors are those of Score.
func (e *Engine) Rollout(ctx context.Context, r Request) (Rollout, error) {
	profile := e.profile(r)
	whole := Measure{BranchStep: 0, RolloutSteps: e.ensemble.Diffusion.StepCount(profile.Steps), Estimator: ensemble.MeanW2}
	profile.ClassGap, profile.RequestRisk = whole, whole
	if err := profile.Validate(e.ensemble.Diffusion); err != nil {
		return Rollout{}, fmt.Errorf("%w: %w", ErrSettings, err)
	}
	manifest := e.ensemble.Manifest
	if e.ensemble.ReferenceEmbedding(0) != nil {
		manifest.Components++ // the component after the last is the reference: see embedding
	}
	p, err := newPlan(&manifest, profile.Steps, profile.GuidanceScale, profile.Eta, []Measure{whole})
	if err != nil {
		return Rollout{}, err
	}
	if p.rows > e.options.MaxRequestRows {
		return Rollout{}, fmt.Errorf("%w: roll-out of %d rows, at most %d", ErrTooLarge, p.rows, e.options.MaxRequestRows)
	}
	f, _, err := e.fly(ctx, r, p, profile)
	if err != nil {
		return Rollout{}, err
	}
	defer e.sampler.release(f)
	out := Rollout{Rows: p.rows}
	for component, mean := range f.means[0] {
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
		return s.ensemble.ReferenceEmbedding(class)
	}
	return s.ensemble.Embedding(component, class)
}

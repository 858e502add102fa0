package scoring

import (
	"context"
	"fmt"
	"slices"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Rollout is the end of a request if each table alone carries it through all steps, with its own guidance.
type Rollout struct {
	Latents map[string][][]float32 // final latents by set of tables: [tables][channels*height*width]
	Rows    int                    // rows of U-Net work
}

// Rollout carries a request from its first latent to the end under each table of the named sets, such as
// ensemble.TablesMembers or ensemble.TablesReference. It takes the steps of the request risk, guidance and eta of the
// request's profile, and measures nothing. Evaluations compare scores with it. Errors are the same as for Score; a set
// that the ensemble does not have is an ErrSettings.
func (e *Engine) Rollout(ctx context.Context, r Request, sets ...string) (Rollout, error) {
	profile := e.profile(r)
	measures := make([]Measure, len(sets))
	for i, set := range sets {
		measures[i] = wholeRollout(e.ensemble.Diffusion, set, profile.RequestRisk.Steps)
	}
	if len(sets) == 0 {
		return Rollout{}, fmt.Errorf("%w: no set of tables is named", ErrSettings)
	}
	p, err := e.compile(profile, measures)
	if err != nil {
		return Rollout{}, err
	}
	t, _, err := e.run(ctx, r, p)
	if err != nil {
		return Rollout{}, err
	}
	defer e.sampler.release(t)
	out := Rollout{Latents: map[string][][]float32{}, Rows: p.rows}
	for i, set := range sets {
		out.Latents[set] = nil
		for _, latent := range t.means[i] {
			out.Latents[set] = append(out.Latents[set], slices.Clone(latent))
		}
	}
	return out, nil
}

// wholeRollout measures tables after all steps of a sampler that is asked for steps, each on its own path.
func wholeRollout(d Diffusion, tables string, steps int) Measure {
	return Measure{Tables: tables, Steps: steps, Guidance: ensemble.GuidanceOwn, RolloutSteps: d.StepCount(steps),
		Estimator: ensemble.MeanW2}
}

// rolloutFrom returns the roll-out of a latent that stands at a step.
func rolloutFrom(step int, m Measure) Measure {
	m.BranchStep += step
	m.RolloutSteps -= step
	return m
}

// Pictures decodes latents, and judges the images if the ensemble has a judge, behind live work.
func (e *Engine) Pictures(ctx context.Context, latents [][]float32) ([]Picture, error) {
	return e.imager.run(ctx, latents, true, Background)
}

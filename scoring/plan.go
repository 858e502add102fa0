package scoring

import (
	"fmt"
	"slices"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/paide"
)

// plan is the work of one request: which paths run which steps, and when their means are read. The carrying
// component's own part of a branch is the shared path itself, which goes on to the last step that any measurement
// needs; a branch adds the M-1 other components. Measurements that branch at one step share its paths.
type plan struct {
	steps      []diffusion.Step
	guidance   float64
	width      int // rows of one path and step: 2 with guidance, else 1
	components int
	measures   []Measure
	branches   []branch // by ascending step
	end        int      // steps of the shared path
	rows       int
}

// branch is a step at which the components leave the shared path.
type branch struct {
	step   int // first step of its paths
	length int // steps of its paths
}

// newPlan compiles the sampler of a profile with one or several measurements.
func newPlan(d Diffusion, components int, profile Profile, measures []Measure) (*plan, error) {
	p := &plan{guidance: profile.GuidanceScale, width: 2, components: components, measures: measures}
	if p.guidance == 1 {
		p.width = 1
	}
	var err error
	p.steps, err = diffusion.Steps(d, measures[0].Steps, profile.Eta)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSettings, err)
	}
	for _, measure := range measures {
		if measure.Steps != measures[0].Steps || measure.Tables != ensemble.TablesMembers ||
			measure.Guidance != ensemble.GuidanceOwn || profile.ImageRisk != (Measure{}) {
			return nil, fmt.Errorf("%w: %s is not supported yet", ErrSettings, measure)
		}
		if needsVariance(measure.Estimator) && p.sigma(measure) == 0 {
			return nil, fmt.Errorf("%w: %s has no variance to divide by after step %d", ErrSettings, measure.Estimator,
				measure.BranchStep+measure.RolloutSteps-1)
		}
		p.end = max(p.end, measure.BranchStep+measure.RolloutSteps)
		i := slices.IndexFunc(p.branches, func(b branch) bool { return b.step == measure.BranchStep })
		if i < 0 {
			i = len(p.branches)
			p.branches = append(p.branches, branch{step: measure.BranchStep})
		}
		p.branches[i].length = max(p.branches[i].length, measure.RolloutSteps)
	}
	slices.SortFunc(p.branches, func(a, b branch) int { return a.step - b.step })
	paths := p.end
	for _, b := range p.branches {
		paths += (p.components - 1) * b.length
	}
	p.rows = p.width * paths
	return p, nil
}

func needsVariance(estimator string) bool {
	return estimator == ensemble.PaiDEKL || estimator == ensemble.PaiDEBhattacharyya
}

// sigma returns the standard deviation of the components' predictive distributions at the end of a measurement. If eta
// is 0, the value for eta 1 is taken, because the estimators that need a variance would be infinite.
func (p *plan) sigma(m Measure) float64 {
	step := p.steps[m.BranchStep+m.RolloutSteps-1]
	if step.Sigma > 0 {
		return step.Sigma
	}
	return step.PosteriorSigma
}

// measure reads a measurement from the means of all components.
func (p *plan) measure(m Measure, means [][]float32, latent ensemble.Latent) Measurement {
	distances := paide.SquaredW2(means)
	switch m.Estimator {
	case ensemble.PaiDEKL:
		distances = distances.Scaled(paide.KLFactor(p.sigma(m)))
	case ensemble.PaiDEBhattacharyya:
		distances = distances.Scaled(paide.BhattacharyyaFactor(p.sigma(m)))
	}
	mean := paide.Mean(distances)
	r := Measurement{
		Estimator: m.Estimator, BranchStep: m.BranchStep, RolloutSteps: m.RolloutSteps,
		Tables: m.Tables, Guidance: m.Guidance, Steps: m.Steps,
		MeanDistance: mean, Shares: paide.Shares(distances), Distances: make([][]float64, len(means)),
	}
	for i := range means {
		r.Distances[i] = distances.Values[i*len(means) : (i+1)*len(means)]
	}
	switch m.Estimator {
	case ensemble.MeanW2:
		r.Value = mean
		return r
	case ensemble.PixelPaiDEW2:
		positions := paide.Map(means, latent.Channels, latent.Height*latent.Width)
		for _, v := range positions {
			r.Value += v / float64(len(positions))
		}
	default:
		r.Value = paide.Estimate(distances)
	}
	r.UpperBound = paide.UpperBound(len(means))
	r.Saturated = paide.Saturated(r.Value, len(means))
	return r
}

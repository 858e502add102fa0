package scoring

import (
	"fmt"
	"slices"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/paide"
)

// plan is the work of one request: its trajectories, and what is read from them.
type plan struct {
	guidance     float64
	eta          float64
	measures     []Measure
	trajectories []trajectory
	noises       int // steps after which noise may be added
	paths        int // of all trajectories
	narrowest    int // rows of a step of the narrowest path
	widest       int
	rows         int
	rowsStopped  int // of a request whose request risk is not measured, if that can be
}

// Measurements of a score, by their index in its plan.
const (
	classGap = iota
	requestRisk
	imageRisk
)

// trajectory is the way of one set of tables through the steps of one sampler. Measurements with the same tables, steps
// and guidance share it. The tables step in groups: all together if they share guidance, else each alone. One group
// carries the shared path to the last step that any measurement needs. A branch adds paths of the other groups, because
// the carrying group's own part of a branch is the shared path itself. Measurements that branch at one step share its
// paths.
type trajectory struct {
	tables   *ensemble.Tables
	steps    []diffusion.Step
	size     int      // tables of a group
	width    int      // rows of a step of a group: its tables, and with guidance the unconditional row
	measures []int    // that are read from it, by their index in the plan
	branches []branch // by ascending step
	start    int      // step at which the first latent stands
	end      int      // steps of the shared path
}

// branch is a step at which the groups leave the shared path.
type branch struct {
	step   int // first step of its paths
	length int // steps of its paths
}

// source is what measurements must have in common to share a trajectory.
type source struct {
	tables   string
	steps    int
	guidance string
	judged   bool // the last step goes to the predicted image, not to the mean
}

func sourceOf(m Measure) source {
	return source{m.Tables, m.Steps, m.Guidance, m.Estimator == ensemble.EstimatorJudge}
}

// newPlan compiles the sampler of a profile with one or several measurements.
func newPlan(e *ensemble.Ensemble, profile Profile, measures []Measure) (*plan, error) {
	p := &plan{guidance: profile.GuidanceScale, eta: profile.Eta, measures: measures}
	var sources []source
	for k, m := range measures {
		i := slices.Index(sources, sourceOf(m))
		if i < 0 {
			t, err := newTrajectory(e, profile, m)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", ErrSettings, err)
			}
			i = len(sources)
			sources, p.trajectories = append(sources, sourceOf(m)), append(p.trajectories, t)
		}
		t := &p.trajectories[i]
		if needsVariance(m.Estimator) && t.sigma(m) == 0 {
			return nil, fmt.Errorf("%w: %s has no variance to divide by after step %d", ErrSettings, m.Estimator,
				m.BranchStep+m.RolloutSteps-1)
		}
		t.read(k, m)
	}
	p.narrowest = p.trajectories[0].width
	for i := range p.trajectories {
		t := &p.trajectories[i]
		if t.judged(measures) {
			t.steps[t.end-1] = t.steps[t.end-1].Origin()
		}
		steps := t.end - t.start
		for _, b := range t.branches {
			steps += (t.groups() - 1) * b.length
		}
		p.noises = max(p.noises, t.end-1) // the mean of the last step is read without its noise
		p.paths += 1 + len(t.branches)*(t.groups()-1)
		p.narrowest, p.widest = min(p.narrowest, t.width), max(p.widest, t.width)
		p.rows += t.width * steps
	}
	return p, nil
}

// newTrajectory returns the trajectory of a measurement, from which nothing is read yet.
func newTrajectory(e *ensemble.Ensemble, profile Profile, m Measure) (trajectory, error) {
	t := trajectory{tables: e.Tables(m.Tables), size: 1, start: profile.Start}
	if t.tables == nil {
		return t, fmt.Errorf("tables is %q, the ensemble has no such tables", m.Tables)
	}
	if m.Guidance == ensemble.GuidanceShared {
		t.size = t.tables.Count()
	}
	t.width = t.size
	if profile.GuidanceScale != 1 {
		t.width++
	}
	var err error
	t.steps, err = diffusion.Steps(e.Diffusion, m.Steps, profile.Eta)
	return t, err
}

// read makes the trajectory long enough for the measurement k.
func (t *trajectory) read(k int, m Measure) {
	t.measures = append(t.measures, k)
	t.end = max(t.end, m.BranchStep+m.RolloutSteps)
	i := slices.IndexFunc(t.branches, func(b branch) bool { return b.step == m.BranchStep })
	if i < 0 {
		i = len(t.branches)
		t.branches = append(t.branches, branch{step: m.BranchStep})
	}
	t.branches[i].length = max(t.branches[i].length, m.RolloutSteps)
	slices.SortFunc(t.branches, func(a, b branch) int { return a.step - b.step })
}

// groups returns the number of groups of tables that step together.
func (t *trajectory) groups() int { return t.tables.Count() / t.size }

// judged reports whether the trajectory ends at a predicted image.
func (t *trajectory) judged(measures []Measure) bool { return sourceOf(measures[t.measures[0]]).judged }

func needsVariance(estimator string) bool {
	return estimator == ensemble.PaiDEKL || estimator == ensemble.PaiDEBhattacharyya
}

// sigma returns the standard deviation of the tables' predictive distributions at the end of a measurement. If eta is
// 0, the value for eta 1 is taken, because the estimators that need a variance would be infinite.
func (t *trajectory) sigma(m Measure) float64 {
	step := t.steps[m.BranchStep+m.RolloutSteps-1]
	if step.Sigma > 0 {
		return step.Sigma
	}
	return step.PosteriorSigma
}

// trajectory returns the trajectory from which a measurement is read.
func (p *plan) trajectory(m Measure) *trajectory {
	i := slices.IndexFunc(p.trajectories, func(t trajectory) bool {
		return sourceOf(p.measures[t.measures[0]]) == sourceOf(m)
	})
	return &p.trajectories[i]
}

// measure reads a measurement of distances from the means of all tables.
func (p *plan) measure(m Measure, means [][]float32, latent ensemble.Latent) Measurement {
	distances := paide.SquaredW2(means)
	switch m.Estimator {
	case ensemble.PaiDEKL:
		distances = distances.Scaled(paide.KLFactor(p.trajectory(m).sigma(m)))
	case ensemble.PaiDEBhattacharyya:
		distances = distances.Scaled(paide.BhattacharyyaFactor(p.trajectory(m).sigma(m)))
	}
	mean := paide.Mean(distances)
	r := newMeasurement(m)
	r.MeanDistance, r.Shares, r.Distances = mean, paide.Shares(distances), make([][]float64, len(means))
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

// newMeasurement returns a measurement that says how it is measured, and no numbers.
func newMeasurement(m Measure) Measurement {
	return Measurement{
		Estimator: m.Estimator, BranchStep: m.BranchStep, RolloutSteps: m.RolloutSteps, Tables: m.Tables,
		Guidance: m.Guidance, Steps: m.Steps,
	}
}

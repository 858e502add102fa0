package scoring

import (
	"slices"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// task is one request in the sampler. The sampler's mutex guards it, but for the latents of paths that a worker runs.
type task struct {
	plan      *plan
	class     int
	cut       float64      // class gap below which the request risk is not measured; 0 measures it always
	undecided bool         // whether the request risk is measured depends on a class gap that is not known yet
	stopped   bool         // it is not measured
	gap       *Measurement // the class gap, once that was decided by it
	priority  Priority
	noise     [][]float32 // by step, if eta is not 0: every table adds the same
	paths     []path      // the shared one of each trajectory first; the length is how many have begun
	buffers   [][]float32 // all latents that it holds
	means     [][][]float32
	running   int     // rows of paths in a run
	spoiled   *worker // that gave output that is not finite
	abandoned bool    // its caller has returned; its memory is given back when it is over
	open      int     // rows of paths that have begun and have steps left
	remaining int     // rows of work left
	served    float64 // rows received, in the virtual time of fair queueing
	err       error
	done      chan struct{} // closed once the task is over
	over      bool
}

// path is a group of tables on its way through the steps of a trajectory. Each table has its own latent.
type path struct {
	*trajectory
	task      *task
	group     int
	branch    int // index in trajectory.branches, or -1 for the shared path
	step, end int // the next step, and the end: one after the last step
	latents   [][]float32
	running   bool
	held      bool // until it is decided whether the request risk is measured
	bad       int  // one more than the table for which the backbone's output was not finite, or 0
}

// table returns the index of the group's table i in its set.
func (p *path) table(i int) int { return p.group*p.size + i }

// unconditional returns the group's unconditional row in the tables of the path, or of a further input.
func (p *path) unconditional(tables *ensemble.Tables) []float32 {
	if p.size > 1 {
		return tables.Shared()
	}
	return tables.Row(p.group, tables.Classes())
}

// forRequestRisk reports whether nothing but the request risk needs the steps that the path has left.
func (p *path) forRequestRisk() bool {
	for _, k := range p.measures {
		m := p.task.plan.measures[k]
		own := p.branch < 0 || p.branches[p.branch].step == m.BranchStep
		if k != requestRisk && own && m.BranchStep+m.RolloutSteps > p.step {
			return false
		}
	}
	return true
}

// nonFinite returns the error of a path whose output is bad.
func (p *path) nonFinite() error {
	return &NonFiniteError{Step: p.step, Component: p.bad - 1, Tables: p.task.plan.measures[p.measures[0]].Tables}
}

// newTask returns the task of a request, whose latents must be drawn yet.
func (s *sampler) newTask(p *plan, r Request) *task {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &task{plan: p, class: r.Class, cut: r.Cut, undecided: r.Cut > 0 && p.rowsStopped > 0, priority: r.Priority,
		paths: make([]path, 0, p.paths), means: make([][][]float32, len(p.measures)), done: make(chan struct{}),
		remaining: p.rows}
	for i := range p.trajectories {
		line := &p.trajectories[i]
		for _, k := range line.measures {
			t.means[k] = make([][]float32, line.tables.Count())
		}
		t.paths = append(t.paths, path{trajectory: line, task: t, group: Carrier(r.Key, line.tables.Count()) / line.size,
			branch: -1, step: line.start, end: line.end, latents: s.buffersFor(t, line.size)})
	}
	if p.eta > 0 {
		t.noise = s.buffersFor(t, p.noises)
	}
	return t
}

// draw fills the task's latents and its noise. No worker has the task yet. If the request brings its latent, the noise
// of the steps follows the draw of a first latent all the same; if there is no such noise, noise may be nil.
func (t *task) draw(noise diffusion.Noise, own *Latent) {
	first := t.paths[0].latents[0]
	if noise != nil {
		noise.Draw(first)
	}
	if own != nil {
		copy(first, own.Values)
	}
	for i := range t.paths {
		for _, latent := range t.paths[i].latents {
			copy(latent, first)
		}
	}
	for _, n := range t.noise {
		noise.Draw(n)
	}
}

// fork begins the branches that leave a shared path at its next step.
func (s *sampler) fork(t *task, shared *path) {
	for i, b := range shared.branches {
		if b.step != shared.step {
			continue
		}
		for group := range shared.groups() {
			if group == shared.group {
				continue
			}
			p := path{trajectory: shared.trajectory, task: t, group: group, branch: i, step: b.step, end: b.step + b.length,
				latents: s.buffersFor(t, shared.size)}
			for j, latent := range p.latents {
				copy(latent, shared.latents[j])
			}
			t.paths = append(t.paths, p) // within the capacity: workers hold pointers to paths
			s.start(t, &t.paths[len(t.paths)-1])
		}
	}
}

// start lets a path begin, unless it must wait for a decision.
func (s *sampler) start(t *task, p *path) {
	p.held = t.undecided && p.forRequestRisk()
	if !p.held {
		s.begin(t, p.width)
	}
}

// begin notes that a path of the given rows has begun.
func (s *sampler) begin(t *task, rows int) {
	t.open += rows
	s.ready[t.priority] += rows
}

// advance moves a path past the step it has taken.
func (s *sampler) advance(t *task, p *path) {
	step := p.step
	p.step++
	for _, k := range p.measures {
		m := t.plan.measures[k]
		ends := m.BranchStep+m.RolloutSteps == p.step
		own := p.branch < 0 || p.branches[p.branch].step == m.BranchStep
		if ends && own {
			s.read(t, p, k)
		}
	}
	s.decide(t)
	switch {
	case p.step == p.end:
		s.begin(t, -p.width)
		return
	case t.undecided && p.forRequestRisk():
		s.begin(t, -p.width)
		p.held = true
	}
	if t.noise != nil {
		for _, latent := range p.latents {
			p.steps[step].AddNoise(latent, t.noise[step])
		}
	}
	if p.branch < 0 {
		s.fork(t, p)
	}
}

// decide ends the paths of the request risk, or lets them begin, as soon as the class gap is known.
func (s *sampler) decide(t *task) {
	if !t.undecided || slices.ContainsFunc(t.means[classGap], func(mean []float32) bool { return mean == nil }) {
		return
	}
	gap := t.plan.measure(t.plan.measures[classGap], t.means[classGap], s.ensemble.Latent)
	t.undecided, t.stopped, t.gap = false, gap.Value < t.cut, &gap
	if t.stopped {
		unneeded := t.plan.rows - t.plan.rowsStopped
		t.remaining -= unneeded
		s.metrics.queued.Sub(float64(unneeded))
	}
	for i := range t.paths {
		p := &t.paths[i]
		switch {
		case t.stopped && p.step < p.end && p.forRequestRisk():
			p.end = p.step
		case p.held:
			s.begin(t, p.width)
		}
		p.held = false
	}
}

// read takes the means of a path for the measurement k.
func (s *sampler) read(t *task, p *path, k int) {
	for i, mean := range p.latents {
		if p.step != p.end {
			mean = s.buffersFor(t, 1)[0]
			copy(mean, p.latents[i])
		}
		t.means[k][p.table(i)] = mean
	}
}

// buffersFor returns the memory of n latents, which the task gives back when it is released. The caller holds the
// mutex.
func (s *sampler) buffersFor(t *task, n int) [][]float32 {
	for range n {
		var b []float32
		if last := len(s.free) - 1; last >= 0 {
			b, s.free = s.free[last], s.free[:last]
		} else {
			b = make([]float32, s.ensemble.Latent.Size())
		}
		t.buffers = append(t.buffers, b)
	}
	return t.buffers[len(t.buffers)-n : len(t.buffers) : len(t.buffers)]
}

// release gives back the memory of a task that is over.
func (s *sampler) release(t *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recycle(t)
}

// recycle is release for callers that hold the mutex.
func (s *sampler) recycle(t *task) {
	s.free = append(s.free, t.buffers...)
	t.paths, t.means, t.noise, t.buffers = nil, nil, nil, nil
}

package scoring

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/ort"
)

// runner runs the first rows of its buffers; Terminate makes a run in progress end soon with ort.ErrTerminated.
type runner interface {
	Run(rows int) error
	Terminate() error
}

// lane is one session of the backbone with the buffers of its rows. One goroutine owns it.
type lane struct {
	runner
	latent   []float32 // [rows, C, H, W]
	timestep []int64   // [rows]
	context  []float32 // [rows, T, D]
	output   []float32 // [rows, C, H, W]

	picked []*path // of the run in progress
	busy   bool
	began  time.Time // of the run in progress
	good   time.Time // end of the last run whose outputs were all finite
	failed error     // of the last run; nil if it was good
	probe  *probe    // that is asked for and has not begun
}

// path is one latent on its way through the steps of one component.
type path struct {
	flight    *flight
	component int
	branch    int // index in plan.branches, or -1 for the shared path
	step, end int // next step, and the one after the last
	latent    []float32
	running   bool
	bad       bool // the backbone's output was not finite
}

// flight is one request in the sampler. The sampler's mutex guards it, but for the latents of paths that a lane runs.
type flight struct {
	plan      *plan
	class     int
	carrier   int
	priority  Priority
	noise     [][]float32 // by step, where eta is not 0: every component adds the same
	paths     []path      // the shared one first; the length is how many have begun
	means     [][][]float32
	running   int     // paths in a run
	spoiled   *lane   // that gave an output which is not finite
	abandoned bool    // its caller has gone; its memory is given back when it is over
	open      int     // paths that have begun and have steps left
	remaining int     // rows of work left
	served    float64 // rows received, in the virtual time of fair queueing
	err       error
	done      chan struct{} // closed once the flight is over
	over      bool
}

// sampler lets the rows of all requests in flight share the runs of the backbone.
//
// Each run takes one step of as many paths as fit, whatever their request, step or component. Live requests come before
// background ones, which fill the room that is left: all of it while no live request is in flight, else up to a
// quarter of a run, so that they slow live ones little. Among equals the request that has received the fewest rows goes
// first, counted from when it joined (start-time fair queueing: Goyal et al., 1996), so a large request neither
// starves nor holds up small ones. As many requests are in flight as a run has room for one path of each; the others
// wait in order.
type sampler struct {
	ensemble *ensemble.Ensemble
	lanes    []*lane
	maxRows  int
	buckets  []int // ascending; empty pads nothing
	metrics  *metrics

	mu     sync.Mutex
	wake   sync.Cond
	queue  [2][]*flight // by priority, first come first
	active [2][]*flight
	joined [2]int     // rows of one path of each active flight
	ready  [2]int     // rows of all open paths of active flights
	clock  [2]float64 // virtual time
	free   [][]float32
	closed bool
	owners sync.WaitGroup

	hang          time.Duration // after which a run counts as hung
	probeLatent   []float32
	probeTimestep int64
}

func newSampler(e *ensemble.Ensemble, lanes []*lane, maxRows int, buckets []int, m *metrics) *sampler {
	s := &sampler{ensemble: e, lanes: lanes, maxRows: maxRows, buckets: buckets, metrics: m, hang: hangLeast}
	s.wake.L = &s.mu
	s.newProbe()
	for _, l := range lanes {
		l.picked = make([]*path, 0, maxRows)
		s.owners.Go(func() { s.own(l) })
	}
	return s
}

// run takes a flight through the sampler. Without an error the flight is over, its means are set, and they belong to the
// caller until release. With an error the flight is not the caller's any more: when ctx ends, run returns at once,
// although a lane may still be in a run with its rows.
func (s *sampler) run(ctx context.Context, f *flight) error {
	f.done = make(chan struct{})
	f.remaining = f.plan.rows
	f.means = make([][][]float32, len(f.plan.measures))
	for i := range f.means {
		f.means[i] = make([][]float32, f.plan.components)
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.queue[f.priority] = append(s.queue[f.priority], f)
	s.metrics.requests.Inc()
	s.metrics.queued.Add(float64(f.remaining))
	s.admit()
	s.wake.Signal()
	s.mu.Unlock()

	select {
	case <-f.done:
	case <-ctx.Done():
		if s.cancel(f, ctx.Err()) {
			return ctx.Err()
		}
	}
	if f.err == nil {
		return nil
	}
	defer s.release(f)
	return s.judge(ctx, f)
}

// admit lets flights join while there is room. The caller holds the mutex.
func (s *sampler) admit() {
	room := s.maxRows * len(s.lanes)
	for priority := range s.queue {
		for len(s.queue[priority]) > 0 {
			f := s.queue[priority][0]
			before := s.joined[Live]
			if Priority(priority) == Background {
				before += s.joined[Background]
			}
			if before+f.plan.width > room {
				return
			}
			s.queue[priority] = slices.Delete(s.queue[priority], 0, 1)
			f.served = s.clock[priority]
			s.active[priority] = append(s.active[priority], f)
			f.open++
			s.joined[priority] += f.plan.width
			s.ready[priority] += f.plan.width
			s.fork(f)
		}
	}
}

// fork begins the branches that leave the shared path at its next step.
func (s *sampler) fork(f *flight) {
	shared := &f.paths[0]
	for i, b := range f.plan.branches {
		if b.step != shared.step {
			continue
		}
		for component := range f.plan.components {
			if component == f.carrier {
				continue
			}
			p := path{flight: f, component: component, branch: i, step: b.step, end: b.step + b.length, latent: s.buffer()}
			copy(p.latent, shared.latent)
			f.paths = append(f.paths, p) // within the capacity: lanes hold pointers to paths
			f.open++
			s.ready[f.priority] += f.plan.width
		}
	}
}

// buffer returns a latent's memory. The caller holds the mutex.
func (s *sampler) buffer() []float32 {
	if n := len(s.free); n > 0 {
		b := s.free[n-1]
		s.free = s.free[:n-1]
		return b
	}
	return make([]float32, s.ensemble.Latent.Size())
}

// takeBuffer is buffer for callers that do not hold the mutex.
func (s *sampler) takeBuffer() []float32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buffer()
}

// release gives the memory of a flight that is over back.
func (s *sampler) release(f *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recycle(f)
}

// recycle is release for callers that hold the mutex.
func (s *sampler) recycle(f *flight) {
	for i := range f.paths {
		s.free = append(s.free, f.paths[i].latent)
	}
	for k, m := range f.plan.measures {
		// Means read before the end of a path were copied, the others are the path's own latent.
		for component, mean := range f.means[k] {
			if mean != nil && m.BranchStep+m.RolloutSteps != f.pathEnd(component, m) {
				s.free = append(s.free, mean)
			}
		}
	}
	s.free = append(s.free, f.noise...)
	f.paths, f.means, f.noise = nil, nil, nil
}

// pathEnd returns the step after the last of the path on which a component's mean is read.
func (f *flight) pathEnd(component int, m Measure) int {
	if component == f.carrier {
		return f.plan.end
	}
	for _, b := range f.plan.branches {
		if b.step == m.BranchStep {
			return b.step + b.length
		}
	}
	return -1
}

// cancel ends a flight early and reports whether it is abandoned: a lane still works on it, and it is over after that.
func (s *sampler) cancel(f *flight, err error) (abandoned bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.over {
		return false
	}
	if f.err == nil {
		f.err = err
	}
	if f.running == 0 {
		s.finish(f)
		s.admit()
		s.wake.Signal()
		return false
	}
	f.abandoned = true
	s.terminateIdle()
	return true
}

// terminateIdle cuts runs short of which nobody wants a row any more. The caller holds the mutex.
func (s *sampler) terminateIdle() {
	for _, l := range s.lanes {
		probing := len(l.picked) == 0 && !s.closed
		if l.busy && !probing && !slices.ContainsFunc(l.picked, func(p *path) bool { return p.flight.err == nil }) {
			// An error leaves the run to end by itself.
			_ = l.Terminate()
		}
	}
}

// finish takes a flight out of the sampler. The caller holds the mutex; no lane works on the flight.
func (s *sampler) finish(f *flight) {
	f.over = true
	if i := slices.Index(s.active[f.priority], f); i >= 0 {
		s.active[f.priority] = slices.Delete(s.active[f.priority], i, i+1)
		s.joined[f.priority] -= f.plan.width
		s.ready[f.priority] -= f.open * f.plan.width
	} else if i := slices.Index(s.queue[f.priority], f); i >= 0 {
		s.queue[f.priority] = slices.Delete(s.queue[f.priority], i, i+1)
	}
	s.metrics.requests.Dec()
	s.metrics.queued.Sub(float64(f.remaining))
	close(f.done)
	if f.abandoned {
		s.recycle(f)
	}
}

// ErrHung is returned by Close if a run did not return; its session is left as it is.
var ErrHung = errors.New("a run of the backbone does not return")

// closeWait is how long close waits for runs after it has terminated them.
const closeWait = 3 * time.Second

// close ends all flights with ErrClosed and waits for the lanes. The error is ErrHung if a run does not return.
func (s *sampler) close() error {
	s.mu.Lock()
	s.closed = true
	for priority := range s.queue {
		for _, f := range slices.Concat(s.queue[priority], s.active[priority]) {
			if f.err == nil {
				f.err = ErrClosed
			}
			if f.running == 0 {
				s.finish(f)
			}
		}
	}
	s.terminateIdle()
	for _, l := range s.lanes {
		if l.probe != nil {
			l.probe.err = ErrClosed
			close(l.probe.done)
			l.probe = nil
		}
	}
	s.wake.Broadcast()
	s.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		s.owners.Wait()
		close(ended)
	}()
	timer := time.NewTimer(closeWait)
	defer timer.Stop()
	select {
	case <-ended:
		return nil
	case <-timer.C:
		return fmt.Errorf("%w: it was terminated %s ago", ErrHung, closeWait)
	}
}

// own is the goroutine of one lane: it picks rows, runs them, updates their latents, and settles what follows. A probe
// that somebody waits for comes first.
func (s *sampler) own(l *lane) {
	for {
		s.mu.Lock()
		for l.probe == nil {
			if s.pick(l); len(l.picked) > 0 {
				break
			}
			if s.closed {
				s.mu.Unlock()
				return
			}
			s.wake.Wait()
		}
		l.busy, l.began = true, time.Now()
		probe := l.probe
		l.probe = nil
		if len(s.lanes) > 1 {
			s.wake.Signal() // another lane takes the rest
		}
		s.mu.Unlock()
		if probe != nil {
			s.serveProbe(l, probe)
			continue
		}

		rows := s.fill(l)
		padded := s.pad(rows)
		err := l.Run(padded)
		if err == nil {
			s.update(l)
		}

		s.mu.Lock()
		s.ended(l, err)
		s.settle(l, rows, padded, err)
		s.mu.Unlock()
	}
}

// serveProbe runs the probe for those who wait for it.
func (s *sampler) serveProbe(l *lane, p *probe) {
	err := s.runProbe(l)
	s.mu.Lock()
	s.ended(l, err)
	s.mu.Unlock()
	if errors.Is(err, ort.ErrTerminated) { // by close
		err = ErrClosed
	}
	p.err = err
	close(p.done)
}

// ended records how a run of l ended. The caller holds the mutex.
func (s *sampler) ended(l *lane, err error) {
	l.busy = false
	if errors.Is(err, ort.ErrTerminated) {
		return
	}
	if err == nil && len(l.picked) > 0 && !slices.ContainsFunc(l.picked, func(p *path) bool { return !p.bad }) {
		err = errors.New("no output of the last run was finite")
	}
	if l.failed = err; err == nil && !slices.ContainsFunc(l.picked, func(p *path) bool { return p.bad }) {
		l.good = time.Now()
	}
}

// pick chooses the paths of the next run. The caller holds the mutex.
func (s *sampler) pick(l *lane) {
	l.picked = l.picked[:0]
	idle := 0
	for _, other := range s.lanes {
		if !other.busy {
			idle++
		}
	}
	waiting := 0
	for priority := range s.active {
		for _, f := range s.active[priority] {
			waiting += (f.open - f.running) * f.plan.width
		}
	}
	// Lanes that are idle share what waits; two rows is the least that any path needs.
	room := min(s.maxRows, max(2, (waiting+idle-1)/idle))
	rows := 0
	for priority := range s.active {
		if Priority(priority) == Background && len(s.active[Live]) > 0 {
			room = min(room, max(2, rows, s.maxRows/4))
		}
		if len(s.active[priority]) == 0 {
			continue
		}
		if rows+s.ready[priority] > room {
			slices.SortStableFunc(s.active[priority], func(a, b *flight) int {
				switch {
				case a.served < b.served:
					return -1
				case a.served > b.served:
					return 1
				}
				return 0
			})
		}
		least := s.active[priority][0].served
		for _, f := range s.active[priority] {
			least = min(least, f.served)
			if f.err != nil {
				continue
			}
			for i := range f.paths {
				p := &f.paths[i]
				if p.running || p.step == p.end || rows+f.plan.width > room {
					continue
				}
				rows += f.plan.width
				f.served += float64(f.plan.width)
				f.running++
				p.running = true
				l.picked = append(l.picked, p)
			}
		}
		s.clock[priority] = max(s.clock[priority], least)
	}
}

// fill copies the rows of the picked paths into the lane's buffers: conditional, then unconditional with guidance.
func (s *sampler) fill(l *lane) (rows int) {
	n, c := s.ensemble.Latent.Size(), s.ensemble.Context.Size()
	for _, p := range l.picked {
		f := p.flight
		class := f.class
		for range f.plan.width {
			copy(l.latent[rows*n:(rows+1)*n], p.latent)
			copy(l.context[rows*c:(rows+1)*c], s.embedding(p.component, class))
			l.timestep[rows] = f.plan.steps[p.step].Timestep
			class = len(s.ensemble.Classes) // the unconditional row
			rows++
		}
	}
	return rows
}

// pad returns the row count of the run: the smallest bucket that holds the rows.
func (s *sampler) pad(rows int) int {
	for _, bucket := range s.buckets {
		if bucket >= rows {
			return bucket
		}
	}
	return rows
}

// update takes the step of every picked path. The means replace the latents; the paths are the lane's alone meanwhile.
func (s *sampler) update(l *lane) {
	n := s.ensemble.Latent.Size()
	at := 0
	for _, p := range l.picked {
		f := p.flight
		conditional := l.output[at : at+n]
		at += n
		var unconditional []float32
		if f.plan.width == 2 {
			unconditional = l.output[at : at+n]
			at += n
		}
		p.bad = !f.plan.steps[p.step].Mean(p.latent, p.latent, conditional, unconditional, f.plan.guidance)
	}
}

// settle ends a run: paths advance, branches begin, flights that are done leave, others join. The caller holds the mutex.
func (s *sampler) settle(l *lane, rows, padded int, err error) {
	terminated := errors.Is(err, ort.ErrTerminated)
	for _, p := range l.picked {
		f := p.flight
		p.running = false
		f.running--
		switch {
		case f.err != nil || terminated: // cancelled, or the row runs again
		case err != nil:
			f.err = err
		case p.bad:
			f.err, f.spoiled = &NonFiniteError{Step: p.step, Component: p.component}, l
		default:
			s.advance(f, p)
		}
	}
	if err == nil {
		s.metrics.batch.Observe(float64(padded))
		s.metrics.rows[padding].Add(float64(padded - rows))
		for _, p := range l.picked {
			s.metrics.rows[p.flight.priority].Add(float64(p.flight.plan.width))
			s.metrics.queued.Sub(float64(p.flight.plan.width))
			p.flight.remaining -= p.flight.plan.width
		}
	}
	for i, p := range l.picked {
		if f := p.flight; !f.over && f.running == 0 && (f.err != nil || f.open == 0) {
			s.finish(f)
		}
		l.picked[i] = nil
	}
	l.picked = l.picked[:0]
	s.admit()
}

// advance moves a path past the step it has taken.
func (s *sampler) advance(f *flight, p *path) {
	step := p.step
	p.step++
	for k, m := range f.plan.measures {
		ends := m.BranchStep+m.RolloutSteps == p.step
		own := p.branch < 0 || f.plan.branches[p.branch].step == m.BranchStep
		if !ends || !own {
			continue
		}
		mean := p.latent
		if p.step != p.end {
			mean = s.buffer()
			copy(mean, p.latent)
		}
		f.means[k][p.component] = mean
	}
	if p.step == p.end {
		f.open--
		s.ready[f.priority] -= f.plan.width
		return
	}
	if f.noise != nil {
		f.plan.steps[step].AddNoise(p.latent, f.noise[step])
	}
	if p.branch < 0 {
		s.fork(f)
	}
}

package scoring

import (
	"cmp"
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

// worker is one session of the backbone with the buffers of its rows. One goroutine owns it.
type worker struct {
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

// path is one latent that one component takes through its steps.
type path struct {
	task      *task
	component int
	branch    int // index in plan.branches, or -1 for the shared path
	step, end int // the next step, and the end: one after the last step
	latent    []float32
	running   bool
	bad       bool // the backbone's output was not finite
}

// task is one request in the sampler. The sampler's mutex guards it, but for the latents of paths that a worker runs.
type task struct {
	plan      *plan
	class     int
	carrier   int
	priority  Priority
	noise     [][]float32 // by step, if eta is not 0: every component adds the same
	paths     []path      // the shared one first; the length is how many have begun
	means     [][][]float32
	running   int     // paths in a run
	spoiled   *worker // that gave output that is not finite
	abandoned bool    // its caller has returned; its memory is given back when it is over
	open      int     // paths that have begun and have steps left
	remaining int     // rows of work left
	served    float64 // rows received, in the virtual time of fair queueing
	err       error
	done      chan struct{} // closed once the task is over
	over      bool
}

// sampler shares the runs of the backbone among the rows of all requests in flight.
//
// Each run takes one step of as many paths as fit, of any request, step or component. Live requests come before
// background ones, which get the rest of the run. While a live request is in flight that is at most a quarter, so that
// live requests are slowed down little. It is also at least their share, over several runs, so that evidence does not
// starve behind a backlog. Among equals the request with the fewest rows since it joined goes first
// (start-time fair queueing: Goyal et al., 1996), so a large request neither starves nor delays small ones. A run has
// room for one path of each request in flight; further requests wait in order.
type sampler struct {
	ensemble *ensemble.Ensemble
	workers  []*worker
	maxRows  int
	buckets  []int // ascending; empty pads nothing
	metrics  *metrics

	mu     sync.Mutex
	wake   sync.Cond
	queue  [2][]*task // by priority, first come first
	active [2][]*task
	joined [2]int     // rows of one path of each active task
	ready  [2]int     // rows of all open paths of active tasks
	clock  [2]float64 // virtual time
	share  float64    // of rows, which background requests get at least
	owed   float64    // rows that background requests lack of their share
	free   [][]float32
	closed bool
	owners sync.WaitGroup

	hang          time.Duration // after which a run counts as hung
	probeLatent   []float32
	probeTimestep int64
}

func newSampler(e *ensemble.Ensemble, workers []*worker, o Options) *sampler {
	s := &sampler{ensemble: e, workers: workers, maxRows: o.MaxBatchRows, buckets: o.Buckets, share: o.BackgroundShare,
		hang: hangLeast}
	s.metrics = newMetrics(o.Registerer, e.Name, s.runAge)
	s.wake.L = &s.mu
	s.newProbe()
	for _, w := range workers {
		w.picked = make([]*path, 0, o.MaxBatchRows)
		s.owners.Go(func() { s.own(w) })
	}
	return s
}

// runAge returns the age of the oldest run in progress, or 0.
func (s *sampler) runAge() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	age := time.Duration(0)
	for _, w := range s.workers {
		if w.busy {
			age = max(age, time.Since(w.began))
		}
	}
	return age
}

// run takes a task through the sampler. Without an error the task is over, its means are set, and they belong to the
// caller until release. With an error the task is not the caller's any more: when ctx ends, run returns at once,
// although a worker may still be in a run with its rows.
func (s *sampler) run(ctx context.Context, t *task) error {
	t.done = make(chan struct{})
	t.remaining = t.plan.rows
	t.means = make([][][]float32, len(t.plan.measures))
	for i := range t.means {
		t.means[i] = make([][]float32, t.plan.components)
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.queue[t.priority] = append(s.queue[t.priority], t)
	s.metrics.requests.Inc()
	s.metrics.queued.Add(float64(t.remaining))
	s.admit()
	s.wake.Signal()
	s.mu.Unlock()

	select {
	case <-t.done:
	case <-ctx.Done():
		if s.cancel(t, ctx.Err()) {
			return ctx.Err()
		}
	}
	if t.err == nil {
		return nil
	}
	defer s.release(t)
	return s.judge(ctx, t)
}

// admit moves tasks from the queue to the active ones while there is room. The caller holds the mutex.
func (s *sampler) admit() {
	room := s.maxRows * len(s.workers)
	for priority := range s.queue {
		for len(s.queue[priority]) > 0 {
			t := s.queue[priority][0]
			before := s.joined[Live]
			switch {
			case Priority(priority) == Live:
			case float64(s.joined[Background]) < s.share*float64(room):
				before = 0 // however many live ones there are
			default:
				before += s.joined[Background]
			}
			if before+t.plan.width > room {
				break
			}
			s.queue[priority] = slices.Delete(s.queue[priority], 0, 1)
			t.served = s.clock[priority]
			s.active[priority] = append(s.active[priority], t)
			t.open++
			s.joined[priority] += t.plan.width
			s.ready[priority] += t.plan.width
			s.fork(t)
		}
	}
}

// fork begins the branches that leave the shared path at its next step.
func (s *sampler) fork(t *task) {
	shared := &t.paths[0]
	for i, b := range t.plan.branches {
		if b.step != shared.step {
			continue
		}
		for component := range t.plan.components {
			if component == t.carrier {
				continue
			}
			p := path{task: t, component: component, branch: i, step: b.step, end: b.step + b.length, latent: s.buffer()}
			copy(p.latent, shared.latent)
			t.paths = append(t.paths, p) // within the capacity: workers hold pointers to paths
			t.open++
			s.ready[t.priority] += t.plan.width
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

// release gives back the memory of a task that is over.
func (s *sampler) release(t *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recycle(t)
}

// recycle is release for callers that hold the mutex.
func (s *sampler) recycle(t *task) {
	for i := range t.paths {
		s.free = append(s.free, t.paths[i].latent)
	}
	for k, m := range t.plan.measures {
		// Means read before the end of a path were copied, the others are the path's own latent.
		for component, mean := range t.means[k] {
			if mean != nil && m.BranchStep+m.RolloutSteps != t.pathEnd(component, m) {
				s.free = append(s.free, mean)
			}
		}
	}
	s.free = append(s.free, t.noise...)
	t.paths, t.means, t.noise = nil, nil, nil
}

// pathEnd returns the step after the last of the path on which a component's mean is read.
func (t *task) pathEnd(component int, m Measure) int {
	if component == t.carrier {
		return t.plan.end
	}
	for _, b := range t.plan.branches {
		if b.step == m.BranchStep {
			return b.step + b.length
		}
	}
	return -1
}

// cancel ends a task early and reports whether it is abandoned: a worker still works on it, and it is over after that.
func (s *sampler) cancel(t *task, err error) (abandoned bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.over {
		return false
	}
	if t.err == nil {
		t.err = err
	}
	if t.running == 0 {
		s.finish(t)
		s.admit()
		s.wake.Signal()
		return false
	}
	t.abandoned = true
	s.terminateIdle()
	return true
}

// terminateIdle cancels runs whose tasks have all ended. The caller holds the mutex.
func (s *sampler) terminateIdle() {
	for _, w := range s.workers {
		probing := len(w.picked) == 0 && !s.closed
		if w.busy && !probing && !slices.ContainsFunc(w.picked, func(p *path) bool { return p.task.err == nil }) {
			// An error leaves the run to end by itself.
			_ = w.Terminate()
		}
	}
}

// finish takes a task out of the sampler. The caller holds the mutex, and no worker works on the task.
func (s *sampler) finish(t *task) {
	t.over = true
	if i := slices.Index(s.active[t.priority], t); i >= 0 {
		s.active[t.priority] = slices.Delete(s.active[t.priority], i, i+1)
		s.joined[t.priority] -= t.plan.width
		s.ready[t.priority] -= t.open * t.plan.width
	} else if i := slices.Index(s.queue[t.priority], t); i >= 0 {
		s.queue[t.priority] = slices.Delete(s.queue[t.priority], i, i+1)
	}
	s.metrics.requests.Dec()
	s.metrics.queued.Sub(float64(t.remaining))
	close(t.done)
	if t.abandoned {
		s.recycle(t)
	}
}

// ErrHung is returned by Close if a run did not return; its session is left as it is.
var ErrHung = errors.New("a run of the backbone does not return")

// closeWait is how long close waits for runs after it has terminated them.
const closeWait = 3 * time.Second

// close ends all tasks with ErrClosed and waits for the workers. The error is ErrHung if a run does not return.
func (s *sampler) close() error {
	s.mu.Lock()
	s.closed = true
	for priority := range s.queue {
		for _, t := range slices.Concat(s.queue[priority], s.active[priority]) {
			if t.err == nil {
				t.err = ErrClosed
			}
			if t.running == 0 {
				s.finish(t)
			}
		}
	}
	s.terminateIdle()
	for _, w := range s.workers {
		if w.probe != nil {
			w.probe.err = ErrClosed
			close(w.probe.done)
			w.probe = nil
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

// own is the goroutine of one worker: it picks rows, runs them, updates their latents, and settles what follows. A
// probe that somebody waits for comes first.
func (s *sampler) own(w *worker) {
	for {
		s.mu.Lock()
		for w.probe == nil {
			if s.pick(w); len(w.picked) > 0 {
				break
			}
			if s.closed {
				s.mu.Unlock()
				return
			}
			s.wake.Wait()
		}
		w.busy, w.began = true, time.Now()
		probe := w.probe
		w.probe = nil
		if len(s.workers) > 1 {
			s.wake.Signal() // another worker takes the rest
		}
		s.mu.Unlock()
		if probe != nil {
			s.serveProbe(w, probe)
			continue
		}

		rows := s.fill(w)
		padded := s.pad(rows)
		err := w.Run(padded)
		if err == nil {
			s.update(w)
		}

		s.mu.Lock()
		s.ended(w, err)
		s.settle(w, rows, padded, err)
		s.mu.Unlock()
	}
}

// serveProbe runs the probe for those who wait for it.
func (s *sampler) serveProbe(w *worker, p *probe) {
	err := s.runProbe(w)
	s.mu.Lock()
	s.ended(w, err)
	s.mu.Unlock()
	if errors.Is(err, ort.ErrTerminated) { // by close
		err = ErrClosed
	}
	p.err = err
	close(p.done)
}

// ended records how a run of w ended. The caller holds the mutex.
func (s *sampler) ended(w *worker, err error) {
	w.busy = false
	if errors.Is(err, ort.ErrTerminated) {
		return
	}
	if err == nil && len(w.picked) > 0 && !slices.ContainsFunc(w.picked, func(p *path) bool { return !p.bad }) {
		err = errors.New("no output of the last run was finite")
	}
	if w.failed = err; err == nil && !slices.ContainsFunc(w.picked, func(p *path) bool { return p.bad }) {
		w.good = time.Now()
	}
}

// pick chooses the paths of the next run. The caller holds the mutex.
func (s *sampler) pick(w *worker) {
	w.picked = w.picked[:0]
	idle := 0
	for _, other := range s.workers {
		if !other.busy {
			idle++
		}
	}
	waiting := 0
	for priority := range s.active {
		for _, t := range s.active[priority] {
			waiting += (t.open - t.running) * t.plan.width
		}
	}
	// Lanes that are idle share what waits; two rows is the least that any path needs.
	room := min(s.maxRows, max(2, (waiting+idle-1)/idle))
	reserved := s.take(w, Background, min(room, s.reserved()), 0)
	live := s.take(w, Live, room, reserved)
	if len(s.active[Live]) > 0 {
		room = min(room, max(2, live, s.maxRows/4))
	}
	rows := s.take(w, Background, room, live)
	s.owe(rows, reserved+rows-live)
}

// reserved returns the rows of the next run that background requests get before live ones.
func (s *sampler) reserved() int {
	if s.owed < 2 { // the least that any path needs
		return 0
	}
	return int(s.owed)
}

// owe notes that background requests got a number of all rows of a run. What their share lacks, they get later; that
// is at most a quarter of a run.
func (s *sampler) owe(rows, background int) {
	s.owed += s.share*float64(rows) - float64(background)
	s.owed = max(0, min(s.owed, max(2, float64(s.maxRows/4))))
	if len(s.active[Live]) == 0 || len(s.active[Background]) == 0 {
		s.owed = 0
	}
}

// take adds paths of a priority to a run that has rows already, up to room, and returns the rows that it has then. The
// caller holds the mutex.
func (s *sampler) take(w *worker, priority Priority, room, rows int) int {
	active := s.active[priority]
	if len(active) == 0 || rows >= room {
		return rows
	}
	if rows+s.ready[priority] > room {
		slices.SortStableFunc(active, func(a, b *task) int { return cmp.Compare(a.served, b.served) })
	}
	least := active[0].served
	for _, t := range active {
		least = min(least, t.served)
		if t.err != nil {
			continue
		}
		for i := range t.paths {
			p := &t.paths[i]
			if p.running || p.step == p.end || rows+t.plan.width > room {
				continue
			}
			rows += t.plan.width
			t.served += float64(t.plan.width)
			t.running++
			p.running = true
			w.picked = append(w.picked, p)
		}
	}
	s.clock[priority] = max(s.clock[priority], least)
	return rows
}

// fill copies the rows of the picked paths into the worker's buffers: conditional, then unconditional with guidance.
func (s *sampler) fill(w *worker) (rows int) {
	n, c := s.ensemble.Latent.Size(), s.ensemble.Context.Size()
	for _, p := range w.picked {
		t := p.task
		class := t.class
		for range t.plan.width {
			copy(w.latent[rows*n:(rows+1)*n], p.latent)
			copy(w.context[rows*c:(rows+1)*c], s.embedding(p.component, class))
			w.timestep[rows] = t.plan.steps[p.step].Timestep
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

// update takes the step of every picked path. The means replace the latents; the paths are the worker's alone
// meanwhile.
func (s *sampler) update(w *worker) {
	n := s.ensemble.Latent.Size()
	at := 0
	for _, p := range w.picked {
		t := p.task
		conditional := w.output[at : at+n]
		at += n
		var unconditional []float32
		if t.plan.width == 2 {
			unconditional = w.output[at : at+n]
			at += n
		}
		p.bad = !t.plan.steps[p.step].Mean(p.latent, p.latent, conditional, unconditional, t.plan.guidance)
	}
}

// settle ends a run: paths advance, branches begin, tasks that are done leave, others join. The caller holds the
// mutex.
func (s *sampler) settle(w *worker, rows, padded int, err error) {
	terminated := errors.Is(err, ort.ErrTerminated)
	for _, p := range w.picked {
		t := p.task
		p.running = false
		t.running--
		switch {
		case t.err != nil || terminated: // cancelled, or the row runs again
		case err != nil:
			t.err = err
		case p.bad:
			t.err, t.spoiled = &NonFiniteError{Step: p.step, Component: p.component}, w
		default:
			s.advance(t, p)
		}
	}
	if err == nil {
		s.metrics.batch.Observe(float64(padded))
		s.metrics.rows[padding].Add(float64(padded - rows))
		for _, p := range w.picked {
			s.metrics.rows[p.task.priority].Add(float64(p.task.plan.width))
			s.metrics.queued.Sub(float64(p.task.plan.width))
			p.task.remaining -= p.task.plan.width
		}
	}
	for i, p := range w.picked {
		if t := p.task; !t.over && t.running == 0 && (t.err != nil || t.open == 0) {
			s.finish(t)
		}
		w.picked[i] = nil
	}
	w.picked = w.picked[:0]
	s.admit()
}

// advance moves a path past the step it has taken.
func (s *sampler) advance(t *task, p *path) {
	step := p.step
	p.step++
	for k, m := range t.plan.measures {
		ends := m.BranchStep+m.RolloutSteps == p.step
		own := p.branch < 0 || t.plan.branches[p.branch].step == m.BranchStep
		if !ends || !own {
			continue
		}
		mean := p.latent
		if p.step != p.end {
			mean = s.buffer()
			copy(mean, p.latent)
		}
		t.means[k][p.component] = mean
	}
	if p.step == p.end {
		t.open--
		s.ready[t.priority] -= t.plan.width
		return
	}
	if t.noise != nil {
		t.plan.steps[step].AddNoise(p.latent, t.noise[step])
	}
	if p.branch < 0 {
		s.fork(t)
	}
}

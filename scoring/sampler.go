package scoring

import (
	"cmp"
	"context"
	"errors"
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
	latent   []float32   // [rows, C, H, W]
	timestep timesteps   // [rows]
	context  []float32   // [rows, T, D]
	more     [][]float32 // [rows, ...] of each further input of the manifest's conditioning
	output   []float32   // [rows, C, H, W]

	vitals
	picked []*path // of the run in progress
}

// timesteps are the timesteps of rows: whole numbers for DDIM, or not for a flow. The other buffer is nil.
type timesteps struct {
	whole []int64
	float []float32
}

func (t timesteps) set(row int, timestep float64) {
	if t.float != nil {
		t.float[row] = float32(timestep)
		return
	}
	t.whole[row] = int64(timestep)
}

// sampler shares the runs of the backbone among the rows of all requests in flight.
//
// Each run takes one step of as many paths as fit, of any request, step or set of tables. Live requests come before
// background ones, which get the rest of the run. While a live request is in flight that is at most a quarter, so that
// live requests are slowed down little. It is also at least their share, over several runs, so that evidence does not
// starve behind a backlog. Among equals the request with the fewest rows since it joined goes first
// (start-time fair queueing: Goyal et al., 1996), so a large request neither starves nor delays small ones. A run has
// room for the narrowest path of each request in flight; further requests wait in order.
type sampler struct {
	ensemble *ensemble.Ensemble
	imager   *imager
	workers  []*worker
	maxRows  int
	buckets  []int // ascending; empty pads nothing
	metrics  *metrics

	mu     sync.Mutex
	wake   sync.Cond
	queue  [2][]*task // by priority, first come first
	active [2][]*task
	joined [2]int     // rows of the narrowest path of each active task
	ready  [2]int     // rows of all open paths of active tasks
	clock  [2]float64 // virtual time
	share  float64    // of rows, which background requests get at least
	owed   float64    // rows that background requests lack of their share
	free   [][]float32
	closed bool
	owners sync.WaitGroup
}

func newSampler(e *ensemble.Ensemble, workers []*worker, m *imager, o Options) *sampler {
	s := &sampler{ensemble: e, workers: workers, imager: m, maxRows: o.MaxBatchRows, buckets: o.Buckets,
		share: o.BackgroundShare}
	s.metrics = newMetrics(o.Registerer, e.Name, s.runAge)
	s.wake.L = &s.mu
	for _, w := range workers {
		w.picked = make([]*path, 0, o.MaxBatchRows)
		w.vitals = vitals{mu: &s.mu, wake: s.wake.Broadcast, what: backbone, hang: hangLeast}
	}
	for _, w := range workers {
		s.owners.Go(func() { s.own(w) })
	}
	return s
}

// busy reports whether live requests wait or run.
func (s *sampler) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue[Live])+len(s.active[Live]) > 0
}

// runAge returns the age of the oldest run in progress, or 0.
func (s *sampler) runAge() time.Duration {
	return max(s.backboneAge(), s.imager.runAge())
}

func (s *sampler) backboneAge() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	age := time.Duration(0)
	for _, w := range s.workers {
		age = max(age, w.age())
	}
	return age
}

// run takes a task through the sampler. Without an error the task is over, its means are set, and they belong to the
// caller until release. With an error the task is not the caller's any more: when ctx ends, run returns at once,
// although a worker may still be in a run with its rows.
func (s *sampler) run(ctx context.Context, t *task) error {
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
	if t.spoiled == nil {
		return t.err
	}
	return t.spoiled.blame(ctx, t.err)
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
			if before+t.plan.narrowest > room {
				break
			}
			s.queue[priority] = slices.Delete(s.queue[priority], 0, 1)
			t.served = s.clock[priority]
			s.active[priority] = append(s.active[priority], t)
			s.joined[priority] += t.plan.narrowest
			for i := range t.plan.trajectories {
				s.start(t, &t.paths[i])
				s.fork(t, &t.paths[i])
			}
		}
	}
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
		s.joined[t.priority] -= t.plan.narrowest
		s.begin(t, -t.open)
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
		w.shut()
	}
	s.wake.Broadcast()
	s.mu.Unlock()
	return await(&s.owners, backbone)
}

// backbone is what the workers run.
const backbone = "backbone"

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
		probe := w.start()
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
		s.settle(w, rows, padded, err)
		s.mu.Unlock()
	}
}

// serveProbe runs the probe for those who wait for it.
func (s *sampler) serveProbe(w *worker, p *probe) {
	err := s.runProbe(w)
	s.mu.Lock()
	w.ended(err, 0, 0)
	s.mu.Unlock()
	p.end(err)
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
	waiting, widest := 0, [2]int{2, 2}
	for priority := range s.active {
		for _, t := range s.active[priority] {
			waiting += t.open - t.running
			widest[priority] = max(widest[priority], t.plan.widest)
		}
	}
	// Workers that are idle share what waits. A run has room for any path.
	room := min(s.maxRows, max(slices.Max(widest[:]), s.full((waiting+idle-1)/idle)))
	reserved := s.take(w, Background, min(room, s.reserved(widest[Background])), 0)
	live := s.take(w, Live, room, reserved)
	if len(s.active[Live]) > 0 {
		room = min(room, max(widest[Background], live, s.maxRows/4))
	}
	rows := s.take(w, Background, room, live)
	s.owe(rows, reserved+rows-live, widest[Background])
}

// splitFrom is the row count from which two runs cost about what one run of all their rows costs.
const splitFrom = 64

// full returns how many of the waiting rows the next run takes: a whole bucket of them, if that run and one for the
// rest are smaller together than one padded run.
func (s *sampler) full(waiting int) int {
	below := 0
	for _, bucket := range s.buckets {
		if bucket <= waiting {
			below = bucket
		}
	}
	if below >= splitFrom && below+s.pad(waiting-below) < s.pad(waiting) {
		return below
	}
	return waiting
}

// reserved returns the rows of the next run that background requests get before live ones: none before any of their
// paths fits.
func (s *sampler) reserved(widest int) int {
	if s.owed < float64(widest) {
		return 0
	}
	return int(s.owed)
}

// owe notes that background requests got a number of all rows of a run. What their share lacks, they get later; that
// is at most a quarter of a run, or their widest path.
func (s *sampler) owe(rows, background, widest int) {
	s.owed += s.share*float64(rows) - float64(background)
	s.owed = max(0, min(s.owed, float64(max(widest, s.maxRows/4))))
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
			if p.running || p.held || p.step == p.end || rows+p.width > room {
				continue
			}
			rows += p.width
			t.served += float64(p.width)
			t.running += p.width
			p.running = true
			w.picked = append(w.picked, p)
		}
	}
	s.clock[priority] = max(s.clock[priority], least)
	return rows
}

// fill copies the rows of the picked paths into the worker's buffers: each table's own, then with guidance the group's
// unconditional row at its mean latent.
func (s *sampler) fill(w *worker) (rows int) {
	n, c := s.ensemble.Latent.Size(), s.ensemble.Context.Size()
	for _, p := range w.picked {
		for i, latent := range p.latents {
			copy(w.latent[rows*n:(rows+1)*n], latent)
			copy(w.context[rows*c:(rows+1)*c], p.tables.Row(p.table(i), p.task.class))
			for k, more := range p.tables.More() {
				copyRow(w.more[k], rows, more.Row(p.table(i), p.task.class))
			}
			w.timestep.set(rows, p.steps[p.step].Timestep)
			rows++
		}
		if p.width > p.size {
			mean(w.latent[rows*n:(rows+1)*n], p.latents)
			copy(w.context[rows*c:(rows+1)*c], p.unconditional(p.tables))
			for k, more := range p.tables.More() {
				copyRow(w.more[k], rows, p.unconditional(more))
			}
			w.timestep.set(rows, p.steps[p.step].Timestep)
			rows++
		}
	}
	return rows
}

// copyRow copies a row to its place among the rows of a run.
func copyRow(dst []float32, at int, row []float32) { copy(dst[at*len(row):(at+1)*len(row)], row) }

// mean writes the mean of latents to dst.
func mean(dst []float32, latents [][]float32) {
	for i := range dst {
		sum := 0.0
		for _, latent := range latents {
			sum += float64(latent[i])
		}
		dst[i] = float32(sum / float64(len(latents)))
	}
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
	output := func(row int) []float32 { return w.output[row*n : (row+1)*n] }
	row := 0
	for _, p := range w.picked {
		var unconditional []float32
		if p.width > p.size {
			unconditional = output(row + p.size)
		}
		p.bad = 0
		for i, latent := range p.latents {
			if !p.steps[p.step].Mean(latent, latent, output(row+i), unconditional, p.task.plan.guidance) && p.bad == 0 {
				p.bad = p.table(i) + 1
			}
		}
		row += p.width
	}
}

// settle ends a run: paths advance, branches begin, tasks that are done leave, others join. The caller holds the
// mutex.
func (s *sampler) settle(w *worker, rows, padded int, err error) {
	bad := 0
	for _, p := range w.picked {
		if p.bad > 0 {
			bad++
		}
	}
	w.ended(err, len(w.picked), bad)
	terminated := errors.Is(err, ort.ErrTerminated)
	for _, p := range w.picked {
		t := p.task
		p.running = false
		t.running -= p.width
		switch {
		case t.err != nil || terminated: // cancelled, or the row runs again
		case err != nil:
			t.err = err
		case p.bad > 0:
			t.err, t.spoiled = p.nonFinite(), w
		default:
			s.advance(t, p)
		}
	}
	if err == nil {
		s.metrics.batch.Observe(float64(padded))
		s.metrics.rows[padding].Add(float64(padded - rows))
		for _, p := range w.picked {
			s.metrics.rows[p.task.priority].Add(float64(p.width))
			s.metrics.queued.Sub(float64(p.width))
			p.task.remaining -= p.width
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

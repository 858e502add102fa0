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

// Picture is a decoded latent, and what the judge says of it.
type Picture struct {
	Image         []float32 // [channels*height*width], in [-1, 1] up to the decoder's overshoot
	Probabilities []float64 // of the classes, by the judge; nil without a judge
}

// stage is a graph with one input, and the buffers of its rows.
type stage struct {
	runner
	input, output []float32
}

// order is the pictures that one caller waits for.
type order struct {
	priority Priority
	latents  [][]float32
	judged   bool
	pictures []Picture
	next     int // latents taken into runs
	open     int // latents without a picture
	err      error
	done     chan struct{} // closed once the order is over
	over     bool
}

// slot is one latent of an order in a run.
type slot struct {
	*order
	index int
}

// imager decodes and judges the latents of all requests, several in one run of each graph. Live orders come first, but
// one row of each run is for background orders that wait. One goroutine owns both sessions.
type imager struct {
	ensemble *ensemble.Ensemble
	decoder  stage
	judge    *judge // nil if the ensemble has no judge
	rows     int    // of a run, at most
	pad      bool   // every run has that many rows
	vitals

	mu     sync.Mutex
	wake   sync.Cond
	queue  [2][]*order
	picked []slot
	faults []error // by picked latent; the goroutine's own
	owner  sync.WaitGroup
}

func newImager(e *ensemble.Ensemble, decoder stage, judge *judge, rows int, pad bool) *imager {
	m := &imager{ensemble: e, decoder: decoder, judge: judge, rows: rows, pad: pad}
	m.wake.L = &m.mu
	m.vitals = vitals{mu: &m.mu, wake: m.wake.Broadcast, what: "decoder and judge", hang: hangLeast}
	m.owner.Go(m.own)
	return m
}

// run decodes latents, and judges the images if judged is true and the ensemble has a judge. It returns at once when
// ctx ends. The latents are the caller's again when run returns.
func (m *imager) run(ctx context.Context, latents [][]float32, judged bool, priority Priority) ([]Picture, error) {
	o := &order{priority: priority, latents: latents, judged: judged && m.judge != nil, open: len(latents),
		pictures: make([]Picture, len(latents)), done: make(chan struct{})}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, ErrClosed
	}
	m.queue[priority] = append(m.queue[priority], o)
	m.wake.Broadcast()
	m.mu.Unlock()
	select {
	case <-o.done:
	case <-ctx.Done():
		m.end(o, ctx.Err())
	}
	if o.err != nil {
		return nil, m.blame(ctx, o.err)
	}
	return o.pictures, nil
}

// runAge returns the age of the run in progress, or 0.
func (m *imager) runAge() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.age()
}

// end ends an order early, and the run in progress if nobody else needs it.
func (m *imager) end(o *order, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if o.over {
		return
	}
	m.finish(o, err)
	m.terminateIdle()
}

// finish takes an order out of the queue. The caller holds the mutex.
func (m *imager) finish(o *order, err error) {
	o.over, o.err = true, err
	m.queue[o.priority] = slices.DeleteFunc(m.queue[o.priority], func(other *order) bool { return other == o })
	close(o.done)
}

// terminateIdle cancels a run whose orders are all over. The caller holds the mutex.
func (m *imager) terminateIdle() {
	probing := len(m.picked) == 0 && !m.closed
	if !m.busy || probing || slices.ContainsFunc(m.picked, func(s slot) bool { return !s.over }) {
		return
	}
	_ = m.decoder.Terminate() // an error leaves the run to end by itself
	if m.judge != nil {
		_ = m.judge.Terminate()
	}
}

// own is the goroutine of both sessions.
func (m *imager) own() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		for m.probe == nil {
			if m.pick(); len(m.picked) > 0 {
				break
			}
			if m.closed {
				return
			}
			m.wake.Wait()
		}
		if p := m.start(); p != nil {
			waiting := m.picked
			m.picked = nil
			m.mu.Unlock()
			err := m.runProbe()
			m.mu.Lock()
			m.picked = waiting
			m.ended(err, 0, 0)
			p.end(err)
			continue
		}
		m.fill()
		picked := m.picked
		m.mu.Unlock()
		err := m.develop(picked)
		m.mu.Lock()
		m.settle(err)
	}
}

// pick takes latents into the next run, beside those that must run again. The caller holds the mutex.
func (m *imager) pick() {
	m.picked = slices.DeleteFunc(m.picked, func(s slot) bool { return s.over })
	reserved := 0
	if len(m.queue[Background]) > 0 {
		reserved = 1
	}
	m.take(Live, m.rows-reserved)
	m.take(Background, m.rows)
}

// take adds latents of a priority to the next run, up to the given rows. The caller holds the mutex.
func (m *imager) take(priority Priority, rows int) {
	for _, o := range m.queue[priority] {
		for o.next < len(o.latents) && len(m.picked) < rows {
			m.picked = append(m.picked, slot{order: o, index: o.next})
			o.next++
		}
	}
}

// fill copies the picked latents into the decoder's input. The caller holds the mutex, because an order's latents are
// its caller's again when it is over.
func (m *imager) fill() {
	for i, s := range m.picked {
		m.put(i, s.latents[s.index])
	}
}

// put makes a latent the decoder's row i.
func (m *imager) put(i int, latent []float32) {
	n := m.ensemble.Latent.Size()
	row := m.decoder.input[i*n : (i+1)*n]
	for j, v := range latent {
		row[j] = float32(float64(v)/m.ensemble.Latent.Scale + m.ensemble.Latent.Shift)
	}
}

// develop decodes and judges the picked latents. What is not finite is a fault of that latent.
func (m *imager) develop(picked []slot) error {
	m.faults = append(m.faults[:0], make([]error, len(picked))...)
	if err := m.decoder.Run(m.padded(len(picked))); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	var judged []int
	for i, s := range picked {
		image := m.image(i)
		if !finite(image) {
			m.faults[i] = &NonFiniteError{Graph: "decoder"}
			continue
		}
		s.pictures[s.index].Image = slices.Clone(image)
		if s.judged {
			m.judge.put(len(judged), image)
			judged = append(judged, i)
		}
	}
	if len(judged) == 0 {
		return nil
	}
	if err := m.judge.Run(m.padded(len(judged))); err != nil {
		return fmt.Errorf("judge: %w", err)
	}
	for row, i := range judged {
		s := picked[i]
		s.pictures[s.index].Probabilities, m.faults[i] = m.judge.read(row)
	}
	return nil
}

// padded returns the row count of a run.
func (m *imager) padded(rows int) int {
	if m.pad {
		return m.rows // the one warmed shape
	}
	return rows
}

func (m *imager) image(row int) []float32 {
	n := m.ensemble.Image.Size()
	return m.decoder.output[row*n : (row+1)*n]
}

// settle ends a run. The caller holds the mutex.
func (m *imager) settle(err error) {
	bad := 0
	for _, fault := range m.faults {
		if fault != nil {
			bad++
		}
	}
	m.ended(err, len(m.picked), bad)
	if errors.Is(err, ort.ErrTerminated) {
		return // those that somebody still waits for run again
	}
	for i, s := range m.picked {
		s.open--
		switch failed := cmp.Or(err, m.faults[i]); {
		case s.over:
		case failed != nil:
			m.finish(s.order, failed)
		case s.open == 0:
			m.finish(s.order, nil)
		}
	}
	m.picked = m.picked[:0]
}

// runProbe decodes and judges a latent whose image and logits were finite when the engine was opened.
func (m *imager) runProbe() error {
	m.put(0, probeLatent(m.ensemble))
	if err := m.retry(m.decoder); err != nil {
		return err
	}
	if !finite(m.image(0)) {
		return errProbe
	}
	if m.judge == nil {
		return nil
	}
	m.judge.put(0, m.image(0))
	if err := m.retry(m.judge.stage); err != nil {
		return err
	}
	if _, err := m.judge.read(0); err != nil {
		return errProbe
	}
	return nil
}

// retry runs one row until nobody terminates it.
func (m *imager) retry(s stage) error {
	err := s.Run(m.padded(1))
	for errors.Is(err, ort.ErrTerminated) && !m.isClosed() {
		err = s.Run(m.padded(1))
	}
	return err
}

// close ends all orders with ErrClosed and waits for the run in progress. The error is ErrHung if it does not return.
func (m *imager) close() error {
	m.mu.Lock()
	m.shut()
	for priority := range m.queue {
		for _, o := range slices.Clone(m.queue[priority]) {
			m.finish(o, ErrClosed)
		}
	}
	m.terminateIdle()
	m.wake.Broadcast()
	m.mu.Unlock()
	return await(&m.owner, m.what)
}

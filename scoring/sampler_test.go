package scoring

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/ort"
)

// fakeWorker is a backbone that predicts its own latents, and lets a test look at a run, hold it up or spoil it.
type fakeWorker struct {
	worker
	before     func(rows int) error
	terminated atomic.Int32
}

func (f *fakeWorker) Run(rows int) error {
	if f.before != nil {
		if err := f.before(rows); err != nil {
			return err
		}
	}
	copy(f.output, f.latent[:rows*len(f.latent)/len(f.timestep.whole)])
	return nil
}

func (f *fakeWorker) Terminate() error {
	f.terminated.Add(1)
	return nil
}

func fakeSampler(t testing.TB, maxRows, workers int, buckets []int) (*Engine, []*fakeWorker) {
	t.Helper()
	return fakeSamplerOf(t, tiny, maxRows, workers, buckets)
}

func fakeSamplerOf(t testing.TB, dir string, maxRows, workers int, buckets []int) (*Engine, []*fakeWorker) {
	t.Helper()
	verified, err := ensemble.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	e := &Engine{options: Options{MaxRequestRows: 1 << 20, MaxBatchRows: maxRows}, ensemble: verified,
		fixed: verified.Profile, plans: map[Profile]*plan{}}
	var fakes []*fakeWorker
	var ls []*worker
	for range workers {
		f := &fakeWorker{}
		f.worker = worker{
			runner:   f,
			latent:   make([]float32, maxRows*verified.Latent.Size()),
			timestep: timesteps{whole: make([]int64, maxRows)},
			context:  make([]float32, maxRows*verified.Context.Size()),
			output:   make([]float32, maxRows*verified.Latent.Size()),
		}
		fakes, ls = append(fakes, f), append(ls, &f.worker)
	}
	decoder, jury := newFakeStage(verified.Latent.Size(), verified.Image.Size()), (*judge)(nil)
	if j := verified.Judge; j != nil {
		opened := newFakeStage(j.Channels*j.Height*j.Width, len(j.Outputs)).stage
		jury = newJudge(opened, j, verified.Image, len(verified.Classes))
	}
	e.imager = newImager(verified, decoder.stage, jury, imageRows, len(buckets) > 0)
	e.sampler = newSampler(verified, ls, e.imager,
		Options{MaxBatchRows: maxRows, Buckets: buckets, BackgroundShare: 0.05})
	t.Cleanup(func() {
		if err := errors.Join(e.sampler.close(), e.imager.close()); err != nil {
			t.Error(err)
		}
	})
	return e, fakes
}

// fakeStage is a decoder or a judge that gives its input, as far as it goes, and lets a test look at a run or spoil it.
type fakeStage struct {
	stage
	before     func(rows int) error
	after      func()
	terminated atomic.Int32
	from, to   int // elements of a row
}

func newFakeStage(from, to int) *fakeStage {
	f := &fakeStage{from: from, to: to}
	f.stage = stage{runner: f, input: make([]float32, imageRows*from), output: make([]float32, imageRows*to)}
	return f
}

func (f *fakeStage) Run(rows int) error {
	if f.before != nil {
		if err := f.before(rows); err != nil {
			return err
		}
	}
	for i := range rows {
		copy(f.output[i*f.to:(i+1)*f.to], f.input[i*f.from:(i+1)*f.from])
	}
	if f.after != nil {
		f.after()
	}
	return nil
}

func (f *fakeStage) Terminate() error {
	f.terminated.Add(1)
	return nil
}

// gate holds every run until the test lets it go.
type gate struct {
	entered chan int // rows of a run
	leave   chan struct{}
}

func newGate() *gate { return &gate{make(chan int), make(chan struct{})} }

func (g *gate) before(rows int) error {
	g.entered <- rows
	<-g.leave
	return nil
}

// next lets the run in progress go and returns the rows of the one after it.
func (g *gate) next() int {
	g.leave <- struct{}{}
	return <-g.entered
}

// scoring is a request on its way.
type inFlight struct {
	result Result
	err    error
	done   chan struct{}
}

func (e *Engine) start(ctx context.Context, r Request) *inFlight {
	s := &inFlight{done: make(chan struct{})}
	go func() {
		defer close(s.done)
		s.result, s.err = e.Score(ctx, r)
	}()
	return s
}

func profileOf(steps int, guidance float64, gap, risk int) Profile {
	return Profile{GuidanceScale: guidance, ClassGap: at(steps, gap, 1, ensemble.PaiDEW2),
		RequestRisk: at(steps, risk, 1, ensemble.MeanW2)}
}

// at is a measurement of the members with their own guidance.
func at(steps, branch, rollout int, estimator string) Measure {
	return Measure{Tables: ensemble.TablesMembers, Steps: steps, Guidance: ensemble.GuidanceOwn, BranchStep: branch,
		RolloutSteps: rollout, Estimator: estimator}
}

// The rows of a request are those that METHOD counts: R = w (s0 + M (S - s0)) of a roll-out, w (s0 + M) of a single
// step; what measurements share is not run twice.
func TestRows(t *testing.T) {
	verified, err := ensemble.Open(tiny)
	if err != nil {
		t.Fatal(err)
	}
	m := verified.Components
	for _, c := range []struct {
		name     string
		guidance float64
		measures []Measure
		want     int
	}{
		{"first step", 2, []Measure{at(20, 0, 1, "paide-w2")}, 2 * m},
		{"first step without guidance", 1, []Measure{at(20, 0, 1, "paide-w2")}, m},
		{"middle", 2, []Measure{at(20, 10, 1, "paide-w2")}, 2 * (10 + m)},
		{"roll-out", 2, []Measure{at(20, 5, 15, "paide-w2")}, 2 * (5 + m*15)},
		{"two branches", 2, []Measure{at(20, 0, 1, "paide-w2"), at(20, 10, 1, "mean-w2")}, 2 * (11 + 2*(m-1))},
		{"one branch read twice", 2, []Measure{at(20, 3, 1, "paide-w2"), at(20, 3, 4, "mean-w2")}, 2 * (3 + m*4)},
		{"the same measurement twice", 2, []Measure{at(20, 3, 2, "paide-w2"), at(20, 3, 2, "mean-w2")}, 2 * (3 + m*2)},
	} {
		p, err := newPlan(verified, Profile{GuidanceScale: c.guidance}, c.measures)
		if err != nil {
			t.Fatal(err)
		}
		if p.rows != c.want {
			t.Errorf("%s: %d rows, want %d", c.name, p.rows, c.want)
		}
	}
}

// The sampler runs exactly the rows that Rows predicts, for one request and for many.
func TestRunsTheRowsItPredicts(t *testing.T) {
	e, workers := fakeSampler(t, 16, 1, nil)
	ran := 0
	workers[0].before = func(rows int) error {
		if rows < 1 || rows > 16 {
			t.Errorf("run of %d rows", rows)
		}
		ran += rows // only the worker's goroutine writes, and reads follow every score
		return nil
	}
	predicted := 0
	var wg sync.WaitGroup
	for i, p := range []Profile{
		profileOf(20, 2, 0, 10), profileOf(7, 1, 3, 3), profileOf(50, 5, 49, 0), profileOf(1, 2, 0, 0), {},
	} {
		for seed := range uint64(20) {
			r := Request{Key: fmt.Sprint(seed), Class: i % 4, Seed: seed, Profile: p, Priority: Priority(seed % 2)}
			predicted += e.Rows(r)
			wg.Go(func() {
				result, err := e.Score(t.Context(), r)
				if err != nil {
					t.Error(err)
				}
				if result.Receipt.Rows != e.Rows(r) {
					t.Errorf("receipt has %d rows, predicted are %d", result.Receipt.Rows, e.Rows(r))
				}
			})
		}
	}
	wg.Wait()
	e.sampler.close()
	if ran != predicted {
		t.Errorf("%d rows ran, predicted are %d", ran, predicted)
	}
	if v := counted(e, Live) + counted(e, Background); v != predicted {
		t.Errorf("the metric counts %v rows", v)
	}
	if v := testutil.ToFloat64(e.sampler.metrics.queued); v != 0 {
		t.Errorf("%v rows are queued after the end", v)
	}
	if e.sampler.ready != [2]int{} {
		t.Errorf("ready rows %v after the end", e.sampler.ready)
	}
}

// counted returns the rows of a kind that the metric counts.
func counted(e *Engine, kind Priority) int {
	return int(testutil.ToFloat64(e.sampler.metrics.rows[kind]))
}

// Rows of requests at different steps share a run, and a new request joins at the next one.
func TestRequestsShareRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 64, 1, nil)
		g := newGate()
		workers[0].before = g.before
		p := profileOf(10, 2, 9, 9) // two rows a step until step 9, then 2M
		first := e.start(t.Context(), Request{Key: "a", Profile: p})
		if rows := <-g.entered; rows != 2 {
			t.Errorf("first run has %d rows, want 2", rows)
		}
		second := e.start(t.Context(), Request{Key: "b", Profile: profileOf(10, 1, 0, 9)})
		synctest.Wait()
		if rows := g.next(); rows != 2+3 {
			t.Errorf("run with a second request at its first branch has %d rows, want 2 + 3", rows)
		}
		if rows := g.next(); rows != 2+1 {
			t.Errorf("run after the branch has %d rows, want 2 + 1", rows)
		}
		workers[0].before = nil
		g.leave <- struct{}{}
		<-first.done
		<-second.done
		if first.err != nil || second.err != nil {
			t.Error(first.err, second.err)
		}
	})
}

// A live request enters the next run before background ones, which then have a quarter of a run.
func TestLiveBeforeBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 16, 1, nil)
		g := newGate()
		workers[0].before = g.before
		p := profileOf(20, 2, 19, 19)
		var background []*inFlight
		for i := range 12 {
			background = append(background, e.start(t.Context(), Request{Key: fmt.Sprint(i), Profile: p, Priority: Background}))
		}
		<-g.entered
		synctest.Wait()
		if rows := g.next(); rows != 16 {
			t.Errorf("background alone has %d rows, want a full run of 16", rows)
		}
		live := e.start(t.Context(), Request{Key: "live", Profile: p})
		synctest.Wait()
		steps := 0
		for ; ; steps++ {
			select {
			case <-live.done:
			default:
				rows := g.next()
				if steps < 19 && rows != 4 { // two live rows, and background up to a quarter of 16 in all
					t.Fatalf("run %d beside a live request has %d rows, want 4", steps, rows)
				}
				synctest.Wait()
				continue
			}
			break
		}
		if steps > 21 {
			t.Errorf("the live request took %d runs for its 20 steps", steps)
		}
		workers[0].before = nil
		g.leave <- struct{}{}
		for _, b := range background {
			if <-b.done; b.err != nil {
				t.Error(b.err)
			}
		}
	})
}

// Background requests get their share of the rows while live requests fill every run, and no more.
func TestBackgroundIsNotStarved(t *testing.T) {
	for _, c := range []struct{ maxRows, workers int }{{64, 1}, {8, 1}, {2, 1}, {32, 2}} {
		synctest.Test(t, func(t *testing.T) {
			e, workers := fakeSampler(t, c.maxRows, c.workers, nil)
			g := newGate()
			for _, w := range workers {
				w.before = g.before
			}
			p := profileOf(900, 2, 899, 899)
			ctx, stop := context.WithCancel(t.Context())
			var all []*inFlight
			for i := range 4 * c.maxRows * c.workers {
				all = append(all, e.start(ctx, Request{Key: fmt.Sprint(i), Profile: p}))
			}
			synctest.Wait()
			for i := range 3 {
				all = append(all, e.start(ctx, Request{Key: fmt.Sprint("background", i), Profile: p, Priority: Background}))
			}
			synctest.Wait()
			rows := e.sampler.metrics.rows
			for range c.workers {
				<-g.entered
			}
			for range 400 {
				g.next()
			}
			background, live := testutil.ToFloat64(rows[Background]), testutil.ToFloat64(rows[Live])
			if share := background / (live + background); share < 0.04 || share > 0.06 {
				t.Errorf("%d rows a run, %d sessions: %.0f background rows beside %.0f live ones, want a share of 0.05",
					c.maxRows, c.workers, background, live)
			}
			stop()
			for _, w := range workers {
				w.before = nil
			}
			for range c.workers {
				g.leave <- struct{}{}
			}
			for _, r := range all {
				if <-r.done; r.err != nil && !errors.Is(r.err, context.Canceled) {
					t.Error(r.err)
				}
			}
		})
	}
}

// A request of thousands of rows neither starves nor holds up small ones.
func TestFairness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 8, 1, nil)
		g := newGate()
		workers[0].before = g.before
		roll := profileOf(100, 2, 0, 0)
		roll.RequestRisk.RolloutSteps = 100
		large := e.start(t.Context(), Request{Key: "large", Profile: roll})
		<-g.entered
		var small []*inFlight
		for i := range 3 {
			small = append(small, e.start(t.Context(), Request{Key: fmt.Sprint(i), Profile: profileOf(10, 2, 9, 9)}))
		}
		synctest.Wait()
		runs := 0
		for slices.ContainsFunc(small, func(s *inFlight) bool {
			select {
			case <-s.done:
				return false
			default:
				return true
			}
		}) {
			g.next()
			runs++
			synctest.Wait()
		}
		// Three small requests need 3 * 2 * (9 + 3) = 72 rows, at least half of every run of 8 is theirs.
		if runs > 2*72/8+4 {
			t.Errorf("small requests took %d runs beside a large one", runs)
		}
		workers[0].before = nil
		g.leave <- struct{}{}
		if <-large.done; large.err != nil {
			t.Error(large.err)
		}
	})
}

// A steady stream of small requests does not starve a large one.
func TestLargeRequestIsNotStarved(t *testing.T) {
	e, _ := fakeSampler(t, 8, 1, nil)
	roll := profileOf(50, 2, 0, 0)
	roll.RequestRisk.RolloutSteps = 50
	large := e.start(t.Context(), Request{Key: "large", Profile: roll})
	var wg sync.WaitGroup
	var served atomic.Int64
	for i := range 8 {
		wg.Go(func() {
			for {
				select {
				case <-large.done:
					return
				default:
				}
				if _, err := e.Score(t.Context(), Request{Key: fmt.Sprint(i), Profile: profileOf(5, 2, 0, 0)}); err != nil {
					t.Error(err)
					return
				}
				if served.Add(1) > 1_000_000 {
					t.Error("a million small requests passed the large one")
					return
				}
			}
		})
	}
	wg.Wait()
	if <-large.done; large.err != nil {
		t.Error(large.err)
	}
}

// A canceled request returns at once. Its rows are freed at the next step: queued and between runs at once, in a run
// when that is over; a run that nobody needs any more is terminated, one that others share is not.
func TestCancellation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 4, 1, nil)
		g := newGate()
		workers[0].before = g.before
		p := profileOf(20, 2, 19, 19)
		cancelled := func(r Request) (*inFlight, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			return e.start(ctx, r), cancel
		}
		a, cancelA := cancelled(Request{Key: "a", Profile: p})
		<-g.entered
		b, cancelB := cancelled(Request{Key: "b", Profile: p})
		synctest.Wait()
		g.next() // both share this run
		queued, cancelQueued := cancelled(Request{Key: "c", Profile: p})
		synctest.Wait()
		cancelQueued()
		synctest.Wait()
		select {
		case <-queued.done:
		default:
			t.Error("a queued request waits for the run of others")
		}
		cancelA()
		synctest.Wait()
		if workers[0].terminated.Load() != 0 {
			t.Error("a run that another request shares was terminated")
		}
		select {
		case <-a.done:
		default:
			t.Error("a canceled request waits for the run")
		}
		if rows := g.next(); rows != 2 {
			t.Errorf("after the cancellation a run has %d rows, want 2", rows)
		}
		<-a.done
		cancelB()
		synctest.Wait()
		if workers[0].terminated.Load() != 1 {
			t.Error("a run that nobody needs was not terminated")
		}
		<-b.done
		workers[0].before = nil
		g.leave <- struct{}{}
		synctest.Wait()
		for name, s := range map[string]*inFlight{"a": a, "b": b, "queued": queued} {
			if !errors.Is(s.err, context.Canceled) {
				t.Errorf("%s: %v", name, s.err)
			}
		}
		if v := testutil.ToFloat64(e.sampler.metrics.requests); v != 0 {
			t.Errorf("%v requests are left", v)
		}
	})
}

// A terminated run leaves nothing behind: rows of others run again.
func TestTerminatedRowsRunAgain(t *testing.T) {
	e, workers := fakeSampler(t, 8, 1, nil)
	runs := 0
	workers[0].before = func(int) error {
		if runs++; runs%3 == 1 {
			return fmt.Errorf("run: %w", ort.ErrTerminated)
		}
		return nil
	}
	spoiled, err := e.Score(t.Context(), Request{Key: "a", Seed: 5})
	if err != nil {
		t.Fatal(err)
	}
	workers[0].before = nil
	clean, err := e.Score(t.Context(), Request{Key: "a", Seed: 5})
	if err != nil {
		t.Fatal(err)
	}
	if spoiled.RequestRisk.Value != clean.RequestRisk.Value || spoiled.ClassGap.Value != clean.ClassGap.Value {
		t.Errorf("scores %v and %v differ from %v and %v", spoiled.ClassGap.Value, spoiled.RequestRisk.Value,
			clean.ClassGap.Value, clean.RequestRisk.Value)
	}
}

// A failed run is the error of the requests that shared it, and the sampler goes on.
func TestRunError(t *testing.T) {
	e, workers := fakeSampler(t, 8, 1, nil)
	broken := errors.New("out of memory")
	workers[0].before = func(int) error { return broken }
	if _, err := e.Score(t.Context(), Request{Key: "a"}); !errors.Is(err, broken) {
		t.Errorf("error is %v", err)
	}
	workers[0].before = nil
	if _, err := e.Score(t.Context(), Request{Key: "a"}); err != nil {
		t.Error(err)
	}
}

// A backbone output that is not finite is an error that names step and component, of that request alone.
func TestNonFiniteOutput(t *testing.T) {
	for _, bad := range []float32{float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1))} {
		e, workers := fakeSampler(t, 64, 1, nil)
		l, n := workers[0], e.ensemble.Latent.Size()
		// The last component's row of class 2 goes wrong at the branch of step 3.
		p := profileOf(10, 1, 3, 5)
		odd := e.ensemble.Components - 1
		if Carrier("bad", e.ensemble.Components) == odd {
			odd--
		}
		timestep := int64(10-1-3)*100 + 1
		l.runner = spoiler{l, func(rows int) {
			for r := range rows {
				row := l.context[r*e.ensemble.Context.Size() : (r+1)*e.ensemble.Context.Size()]
				if l.timestep.whole[r] == timestep && slices.Equal(row, e.ensemble.Members().Row(odd, 2)) {
					l.output[r*n+1] = bad
				}
			}
		}}
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				if _, err := e.Score(t.Context(), Request{Key: fmt.Sprint(i), Class: 1, Profile: p}); err != nil {
					t.Errorf("neighbour: %v", err)
				}
			})
		}
		_, err := e.Score(t.Context(), Request{Key: "bad", Class: 2, Profile: p})
		var nonFinite *NonFiniteError
		if !errors.As(err, &nonFinite) || nonFinite.Step != 3 || nonFinite.Component != odd {
			t.Errorf("error is %v, want step 3, component %d", err, odd)
		}
		wg.Wait()
	}
}

type spoiler struct {
	*fakeWorker
	after func(rows int)
}

func (s spoiler) Run(rows int) error {
	err := s.fakeWorker.Run(rows)
	s.after(rows)
	return err
}

// A run takes a whole bucket of what waits, if two runs are smaller than one that is padded. Small runs are not split:
// each has a cost of its own.
func TestRunsFillBuckets(t *testing.T) {
	want := []int{1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256}
	if have := defaultBuckets(256); !slices.Equal(have, want) {
		t.Errorf("buckets %v, want %v", have, want)
	}
	if have := defaultBuckets(100); !slices.Equal(have, []int{1, 2, 4, 8, 16, 32, 48, 64, 96, 100}) {
		t.Errorf("buckets up to 100: %v", have)
	}
	s := &sampler{buckets: want}
	for _, c := range []struct{ waiting, want, padded int }{
		{1, 1, 1}, {3, 3, 4}, {9, 9, 16}, {33, 33, 48}, // too small to be split
		{64, 64, 64}, {65, 64, 64}, {80, 64, 64}, {81, 81, 96}, {96, 96, 96},
		{97, 96, 96}, {129, 128, 128}, {150, 128, 128}, {190, 190, 192}, {192, 192, 192}, {255, 255, 256},
		{256, 256, 256}, {300, 256, 256},
	} {
		have := s.full(c.waiting)
		if have = min(have, 256); have != c.want || s.pad(have) != c.padded {
			t.Errorf("%d rows wait: a run of %d padded to %d, want %d and %d", c.waiting, have, s.pad(have), c.want, c.padded)
		}
	}
	if have := (&sampler{}).full(150); have != 150 {
		t.Errorf("without buckets, a run of %d", have)
	}
}

func TestBucketsPadRuns(t *testing.T) {
	e, workers := fakeSampler(t, 16, 1, []int{4, 16})
	workers[0].before = func(rows int) error {
		if rows != 4 && rows != 16 {
			t.Errorf("run of %d rows", rows)
		}
		return nil
	}
	if _, err := e.Score(t.Context(), Request{Key: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := e.sampler.close(); err != nil {
		t.Error(err)
	}
	// The tiny profile: 2M = 6 rows, four runs of 2, then at step 5 the branch of two steps with 6 rows each.
	if v := testutil.ToFloat64(e.sampler.metrics.rows[padding]); v != 10+4*2+2*10 {
		t.Errorf("%v padded rows", v)
	}
}

func TestLanesShareTheWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 16, 2, nil)
		gates := []*gate{newGate(), newGate()}
		for i, l := range workers {
			l.before = gates[i].before
		}
		var requests []*inFlight
		for i := range 8 {
			requests = append(requests, e.start(t.Context(), Request{Key: fmt.Sprint(i), Profile: profileOf(10, 2, 9, 9)}))
			synctest.Wait()
		}
		rows := <-gates[0].entered + <-gates[1].entered // both run at once
		if rows < 2 {
			t.Errorf("%d rows", rows)
		}
		for _, l := range workers {
			l.before = nil
		}
		gates[0].leave <- struct{}{}
		gates[1].leave <- struct{}{}
		for _, r := range requests {
			if <-r.done; r.err != nil {
				t.Error(r.err)
			}
		}
	})
}

func TestCloseEndsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, workers := fakeSampler(t, 2, 1, nil)
		g := newGate()
		workers[0].before = g.before
		running := e.start(t.Context(), Request{Key: "a"})
		<-g.entered
		queued := e.start(t.Context(), Request{Key: "b"})
		synctest.Wait()
		closed := make(chan struct{})
		go func() {
			if err := e.sampler.close(); err != nil {
				t.Error(err)
			}
			close(closed)
		}()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("close did not wait for the run")
		default:
		}
		if workers[0].terminated.Load() != 1 {
			t.Error("the run was not terminated")
		}
		workers[0].before = nil
		g.leave <- struct{}{}
		<-closed
		<-running.done
		<-queued.done
		if !errors.Is(running.err, ErrClosed) || !errors.Is(queued.err, ErrClosed) {
			t.Errorf("errors are %v and %v", running.err, queued.err)
		}
		if _, err := e.Score(t.Context(), Request{Key: "c"}); !errors.Is(err, ErrClosed) {
			t.Errorf("after close: %v", err)
		}
	})
}

// A step allocates nothing of its own: requests of 10 and of 90 steps allocate alike.
func TestStepsDoNotAllocate(t *testing.T) {
	e, _ := fakeSampler(t, 64, 1, nil)
	allocations := func(steps int) float64 {
		r := Request{Key: "a", Profile: profileOf(steps, 2, 0, steps-1)}
		return testing.AllocsPerRun(50, func() {
			if _, err := e.Score(context.Background(), r); err != nil {
				t.Fatal(err)
			}
		})
	}
	few, many := allocations(10), allocations(90)
	if many > few+1 {
		t.Errorf("10 steps allocate %v times, 90 steps %v times", few, many)
	}
}

// BenchmarkOverhead is what the sampler itself costs a row, without the backbone: choosing, copying, the DDIM update,
// noise and estimators, with 64 requests of the shipped ensemble in flight.
func BenchmarkOverhead(b *testing.B) {
	e, _ := fakeSamplerOf(b, shipped, 64, 1, nil)
	rows := e.Rows(Request{})
	var next atomic.Int64
	b.ReportAllocs()
	b.ResetTimer()
	spent := cpuTime(b)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for {
				i := next.Add(1)
				if i > int64(b.N) {
					return
				}
				if _, err := e.Score(context.Background(), Request{Key: fmt.Sprint(i), Seed: uint64(i)}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64((cpuTime(b)-spent).Nanoseconds())/float64(b.N*rows), "cpu-ns/row")
}

// cpuTime returns the CPU time of this process.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

package scoring

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/ort"
)

// tiny-2 has three members, three posterior tables and four classes. Its judge can tell classes 0 and 3.
const (
	told    = 0
	untold  = 1
	weak    = 2
	doubled = 3 // two outputs stand for it
)

// profiles2 are profiles of every kind: the ensemble's, without guidance, with noise, of a whole roll-out, and as
// format 1 could express it.
func profiles2(e *Engine) []Profile {
	plain, noisy, long := e.Profile(), e.Profile(), e.Profile()
	plain.GuidanceScale = 1
	noisy.Eta = 0.7
	long = long.WithSampler(e.ensemble.Diffusion, 9, 3, 0)
	long.ClassGap.Guidance, long.RequestRisk.RolloutSteps = ensemble.GuidanceOwn, 9
	return []Profile{e.Profile(), plain, noisy, long, profileOf(7, 2, 3, 5)}
}

// A request costs the rows of its trajectories. A class that the judge cannot tell costs no row of the producer's.
func TestRowsOfFormat2(t *testing.T) {
	e, _ := fakeSamplerOf(t, tiny2, 64, 1, nil)
	shared := e.Profile()
	shared.ClassGap = shared.RequestRisk
	shared.ClassGap.RolloutSteps = 1
	unguided := e.Profile()
	unguided.GuidanceScale = 1
	for _, c := range []struct {
		name    string
		class   int
		profile Profile
		want    int
	}{
		{"the ensemble's profile", told, Profile{}, (3 + 1) + 2*(3+1) + 3*2},
		{"a class of two outputs", doubled, Profile{}, 4 + 8 + 6},
		{"no output stands for the class", untold, Profile{}, 4 + 8},
		{"the judge is too weak", weak, Profile{}, 4 + 8},
		{"one trajectory is read twice", untold, shared, 8},
		{"without guidance", told, unguided, 3 + 2*3 + 3},
	} {
		r := Request{Key: "a", Class: c.class, Profile: c.profile}
		result, err := e.Score(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if have := e.Rows(r); have != c.want || result.Receipt.Rows != c.want {
			t.Errorf("%s: %d rows, %d in the receipt, want %d", c.name, have, result.Receipt.Rows, c.want)
		}
		if receipt := result.Receipt; receipt.Settings != e.profile(r).Settings() {
			t.Errorf("%s: settings %q are not those of all classes", c.name, receipt.Settings)
		}
	}
}

// The sampler runs exactly the rows that it predicts, in any run size, with any padding, for profiles of every kind.
func TestRunsTheRowsOfFormat2(t *testing.T) {
	for _, c := range []struct {
		maxRows, workers int
		buckets          []int
	}{{4, 1, nil}, {16, 1, nil}, {8, 2, nil}, {5, 3, []int{5}}} {
		e, workers := fakeSamplerOf(t, tiny2, c.maxRows, c.workers, c.buckets)
		for _, w := range workers {
			w.before = func(rows int) error {
				if rows > c.maxRows {
					t.Errorf("run of %d rows, at most %d", rows, c.maxRows)
				}
				return nil
			}
		}
		want := 0
		var wg sync.WaitGroup
		for i, p := range profiles2(e) {
			for class := range 4 {
				r := Request{Key: fmt.Sprint(i), Class: class, Seed: uint64(class), Profile: p, Priority: Priority(class % 2)}
				want += e.Rows(r)
				wg.Go(func() {
					if _, err := e.Score(t.Context(), r); err != nil {
						t.Errorf("profile %d, class %d: %v", i, class, err)
					}
				})
			}
		}
		wg.Wait()
		if have := counted(e, Live) + counted(e, Background); have != want {
			t.Errorf("%d rows ran, predicted are %d", have, want)
		}
		if e.sampler.ready != [2]int{} || e.sampler.joined != [2]int{} {
			t.Errorf("after the end %v rows are ready and %v joined", e.sampler.ready, e.sampler.joined)
		}
	}
}

// Requests of every kind among others score as each alone.
func TestMixedTrafficOfFormat2(t *testing.T) {
	reference := open(t, tiny2, Options{Threads: 1})
	var requests []Request
	for i, p := range profiles2(reference) {
		for class := range 4 {
			requests = append(requests, Request{Key: fmt.Sprint("mixed\n", i), Class: class, Seed: uint64(10*i + class),
				Profile: p, Priority: Priority((i + class) % 2)})
		}
	}
	alone := make([]Result, len(requests))
	for i, r := range requests {
		var err error
		if alone[i], err = reference.Score(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	for _, o := range []Options{
		{Threads: 1}, {MaxBatchRows: 4, Threads: 1}, {Sessions: 2, Threads: 1}, {MaxBatchRows: 16, Buckets: []int{4, 16}},
	} {
		e := open(t, tiny2, o)
		var wg sync.WaitGroup
		for i, r := range requests {
			wg.Go(func() {
				result, err := e.Score(t.Context(), r)
				if err != nil {
					t.Errorf("request %d: %v", i, err)
					return
				}
				compareResults(t, i, result, alone[i])
			})
		}
		wg.Wait()
	}
}

func compareResults(t *testing.T, i int, a, b Result) {
	t.Helper()
	if (a.ImageRisk == nil) != (b.ImageRisk == nil) || a.ImageRiskReason != b.ImageRiskReason {
		t.Errorf("request %d: image risk %v (%s), alone %v (%s)", i, a.ImageRisk, a.ImageRiskReason, b.ImageRisk,
			b.ImageRiskReason)
		return
	}
	pairs := [][2]Measurement{{a.ClassGap, b.ClassGap}, {*a.RequestRisk, *b.RequestRisk}}
	if a.ImageRisk != nil {
		pairs = append(pairs, [2]Measurement{*a.ImageRisk, *b.ImageRisk})
	}
	for _, m := range pairs {
		if !Agrees(m[0].Value, m[1].Value) || !Agrees(m[0].MeanDistance, m[1].MeanDistance) {
			t.Errorf("request %d: %s is %v among others, %v alone", i, m[0].Tables, m[0].Value, m[1].Value)
		}
	}
}

// Shared guidance needs a run of all tables and one row more. A smaller run is refused by the name of its setting.
func TestSharedGuidanceNeedsRoom(t *testing.T) {
	e, err := Open(tiny2, Options{Threads: 1, MaxBatchRows: 3})
	if !errors.Is(err, ErrTooLarge) ||
		!strings.Contains(err.Error(), "needs runs of 4 rows, scoring.max-batch-rows is 3") {
		t.Errorf("error is %v", err)
	}
	if err == nil {
		_ = e.Close()
	}
	fits := open(t, tiny2, Options{Threads: 1, MaxBatchRows: 4})
	if _, err := fits.Score(t.Context(), Request{Key: "a"}); err != nil {
		t.Error(err)
	}
}

// What a request asks of an ensemble that does not have it is refused by name.
func TestFormat2Refuses(t *testing.T) {
	old, e := open(t, tiny, Options{Threads: 1}), open(t, tiny2, Options{Threads: 1})
	from := func(base Profile, change func(*Profile)) Profile {
		change(&base)
		return base
	}
	for _, c := range []struct {
		engine  *Engine
		profile Profile
		says    string
	}{
		{old, e.Profile(), `class_gap.tables is "posterior", the ensemble has no such tables`},
		{old, from(old.Profile(), func(p *Profile) { p.ImageRisk = e.Profile().ImageRisk }), "image_risk.estimator"},
		{e, from(e.Profile(), func(p *Profile) { p.ImageRisk.Guidance = "shared" }), "image_risk.guidance"},
		{e, from(e.Profile(), func(p *Profile) { p.ImageRisk.BranchStep = 1 }), "image_risk.branch_step is 1, must be 0"},
		{e, from(e.Profile(), func(p *Profile) { p.RequestRisk.BranchStep = 1; p.RequestRisk.RolloutSteps = 1 }),
			"request_risk.branch_step is 1, must be 0 with shared guidance"},
		{e, from(e.Profile(), func(p *Profile) { p.RequestRisk.Tables = "producer" }), "request_risk.tables"},
		{e, from(e.Profile(), func(p *Profile) { p.RequestRisk.Estimator = "judge" }), "request_risk.estimator"},
		{e, from(e.Profile(), func(p *Profile) { p.ClassGap.Guidance = "none" }), "class_gap.guidance"},
		{e, from(e.Profile(), func(p *Profile) { p.ImageRisk.Steps = 0 }), "image_risk.steps is 0"},
	} {
		for _, class := range []int{told, untold} {
			r := Request{Key: "a", Class: class, Profile: c.profile}
			_, err := c.engine.Score(t.Context(), r)
			if !errors.Is(err, ErrSettings) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("class %d: error %v does not say %q", class, err, c.says)
			}
			if before := c.engine.Validate(r); fmt.Sprint(before) != fmt.Sprint(err) || c.engine.Rows(r) != 0 {
				t.Errorf("class %d: Validate returns %v, Score %v, %d rows", class, before, err, c.engine.Rows(r))
			}
		}
	}
	if _, err := e.Rollout(t.Context(), Request{Key: "a"}, "heirs"); !errors.Is(err, ErrSettings) {
		t.Errorf("roll-out of unknown tables: %v", err)
	}
}

// The latents of requests are used again, however the requests end: the sampler holds no more after many requests than
// after few.
func TestBuffersAreRecycled(t *testing.T) {
	e, _ := fakeSamplerOf(t, tiny2, 16, 1, nil)
	round := func() int {
		for _, p := range profiles2(e) {
			for class := range 4 {
				if _, err := e.Score(t.Context(), Request{Key: "a", Class: class, Profile: p}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := e.Evidence(t.Context(), Request{Key: "a"}); err != nil {
			t.Fatal(err)
		}
		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := e.Score(canceled, Request{Key: "a"}); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		return len(e.sampler.free)
	}
	few := round()
	for range 5 {
		if many := round(); many != few {
			t.Fatalf("%d buffers after one round, %d later", few, many)
		}
	}
}

// The receipt says on which data of the class the class gap stands.
func TestReceiptNamesTheClassData(t *testing.T) {
	e := open(t, tiny2, Options{Threads: 1})
	for class := range 4 {
		result, err := e.Score(t.Context(), Request{Key: "a", Class: class})
		if err != nil {
			t.Fatal(err)
		}
		known, have := e.ensemble.Classes[class], result.Receipt
		images, nEff := 0, 0.0
		if known.Data != nil {
			images, nEff = known.Data.Images, known.Data.NEff
		}
		if have.ClassDraws != known.Draws || have.ClassImages != images || have.ClassNEff != nEff {
			t.Errorf("class %d: receipt %+v", class, have)
		}
		if have.Profile != ProfileFixed || have.Steps != e.Profile().RequestRisk.Steps {
			t.Errorf("class %d: receipt %+v", class, have)
		}
	}
}

// fakeJudge returns the judge's fake of an engine, and its decoder's.
func fakeJudge(e *Engine) (decoder, judge *fakeStage) {
	return e.imager.decoder.runner.(*fakeStage), e.imager.judge.runner.(*fakeStage)
}

// Output of decoder or judge that is not finite costs the request its image risk, and nothing else, and nobody else's.
func TestNonFinitePicture(t *testing.T) {
	for name, bad := range map[string]float32{"NaN": float32(math.NaN()), "infinity": float32(math.Inf(-1))} {
		for _, graph := range []string{"decoder", "judge"} {
			e, _ := fakeSamplerOf(t, tiny2, 64, 1, nil)
			decoder, judge := fakeJudge(e)
			broken := map[string]*fakeStage{"decoder": decoder, "judge": judge}[graph]
			odd := true // every other run is spoiled, but no probe
			broken.after = func() {
				if odd = !odd; odd && len(e.imager.picked) > 0 {
					broken.output[0] = bad
				}
			}
			failures := 0
			for seed := range uint64(6) {
				result, err := e.Score(t.Context(), Request{Key: "a", Class: told, Seed: seed})
				switch {
				case err != nil:
					t.Errorf("%s of the %s: %v", name, graph, err)
				case result.RequestRisk == nil || len(result.ClassGap.Distances) == 0 || result.Receipt.Rows == 0:
					t.Errorf("%s of the %s: the other measurements are gone: %+v", name, graph, result)
				case result.ImageRisk == nil && result.ImageRiskReason == ReasonNotFinite:
					failures++
				case result.ImageRisk == nil || result.ImageRiskReason != "" || !(result.ImageRisk.Value <= 1):
					t.Errorf("%s of the %s: image risk %+v %q", name, graph, result.ImageRisk, result.ImageRiskReason)
				}
			}
			if failures == 0 || failures == 6 {
				t.Errorf("%s of the %s: %d of 6 requests failed", name, graph, failures)
			}
		}
	}
}

// If the probe is not finite either, it is the device.
func TestNonFiniteJudgeDevice(t *testing.T) {
	e, _ := fakeSamplerOf(t, tiny2, 64, 1, nil)
	_, judge := fakeJudge(e)
	judge.after = func() { judge.output[0] = float32(math.NaN()) }
	_, err := e.Score(t.Context(), Request{Key: "a", Class: told})
	var device *DeviceError
	var nonFinite *NonFiniteError
	if !errors.As(err, &device) || !device.Unavailable() || errors.As(err, &nonFinite) {
		t.Errorf("error is %v", err)
	}
	if err := e.Check(t.Context(), time.Hour); !errors.Is(err, errProbe) {
		t.Errorf("check: %v", err)
	}
	judge.after = nil
	if err := e.Check(t.Context(), time.Hour); err != nil {
		t.Errorf("check after it: %v", err)
	}
	if _, err := e.Score(t.Context(), Request{Key: "a", Class: told}); err != nil {
		t.Error(err)
	}
}

// A judge that hangs ends at the deadline of its requests, counts as hung, and works again when it returns.
func TestHungJudge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := fakeSamplerOf(t, tiny2, 64, 1, nil)
		_, judge := fakeJudge(e)
		g := newGate()
		judge.before = g.before
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		s := e.start(ctx, Request{Key: "a", Class: told})
		<-g.entered
		<-s.done
		if !errors.Is(s.err, context.DeadlineExceeded) || judge.terminated.Load() != 1 {
			t.Errorf("error %v, terminated %d times", s.err, judge.terminated.Load())
		}
		// A class that the judge cannot tell does not wait for it.
		if _, err := e.Score(t.Context(), Request{Key: "b", Class: untold}); err != nil {
			t.Error(err)
		}
		time.Sleep(hangLeast)
		if age := e.sampler.runAge(); age != 13*time.Second {
			t.Errorf("the oldest run is %s old", age)
		}
		if err := e.Check(t.Context(), time.Hour); err == nil ||
			!strings.Contains(err.Error(), "a run of the decoder and judge has not returned for 13s") {
			t.Errorf("check: %v", err)
		}
		judge.before = nil
		g.leave <- struct{}{}
		synctest.Wait()
		if err := e.Check(t.Context(), 0); err != nil {
			t.Errorf("check after the hang: %v", err)
		}
		if _, err := e.Score(t.Context(), Request{Key: "c", Class: told}); err != nil {
			t.Error(err)
		}
	})
}

// Close does not wait for a judge that never returns, and ends those who wait for it.
func TestCloseWithHungJudge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := fakeSamplerOf(t, tiny2, 64, 1, nil)
		_, judge := fakeJudge(e)
		g := newGate()
		judge.before = g.before
		s := e.start(t.Context(), Request{Key: "a", Class: told})
		<-g.entered
		if err := e.Close(); !errors.Is(err, ErrHung) {
			t.Errorf("close: %v", err)
		}
		if <-s.done; !errors.Is(s.err, ErrClosed) {
			t.Errorf("request: %v", s.err)
		}
		judge.before = nil
		g.leave <- struct{}{}
	})
}

// Requests share the runs of decoder and judge. A run that nobody needs any more is terminated, and what others need of
// it runs again.
func TestPicturesShareRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := fakeSamplerOf(t, tiny2, 64, 1, nil)
		decoder, judge := fakeJudge(e)
		g := newGate()
		decoder.before = g.before
		first := e.start(t.Context(), Request{Key: "first", Class: told})
		if rows := <-g.entered; rows != 1 {
			t.Errorf("the first run has %d rows", rows)
		}
		var others []*inFlight
		for i := range imageRows + 3 {
			others = append(others, e.start(t.Context(), Request{Key: fmt.Sprint(i), Class: told}))
		}
		background := e.start(t.Context(), Request{Key: "background", Class: told, Priority: Background})
		synctest.Wait()
		if rows := g.next(); rows != imageRows {
			t.Errorf("the run of those that wait has %d rows, want %d", rows, imageRows)
		}
		decoder.before = func(int) error { // once terminated, then as it is
			decoder.before = nil
			return fmt.Errorf("run: %w", ort.ErrTerminated)
		}
		g.leave <- struct{}{}
		for _, s := range append(others, first, background) {
			if <-s.done; s.err != nil || s.result.ImageRisk == nil {
				t.Errorf("error %v, image risk %v", s.err, s.result.ImageRisk)
			}
		}
		if judge.terminated.Load() != 0 {
			t.Error("a run that others need was terminated")
		}
	})
}

// The evidence of format 2 has the producer's image with what the judge says of it, in steps enough for an image.
func TestEvidenceOfFormat2(t *testing.T) {
	e := open(t, tiny2, Options{Threads: 1})
	for _, class := range []int{told, untold} {
		r := Request{Key: "evidence", Class: class, Seed: 5}
		evidence, err := e.Evidence(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		score, err := e.Score(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		compareResults(t, class, evidence.Result, score)
		if evidence.Result.Receipt.Rows != score.Receipt.Rows || evidence.Result.Receipt.Settings != score.Receipt.Settings {
			t.Errorf("receipts differ: %+v, %+v", evidence.Result.Receipt, score.Receipt)
		}
		if evidence.Final.Steps != evidenceSteps || evidence.Final.RolloutSteps != evidenceSteps {
			t.Errorf("images take %d of %d steps", evidence.Final.RolloutSteps, evidence.Final.Steps)
		}
		rolled := r
		rolled.Profile = e.evidenceProfile(e.Profile())
		rollout, err := e.Rollout(t.Context(), rolled, ensemble.TablesProducer)
		if err != nil {
			t.Fatal(err)
		}
		pictures, err := e.Pictures(t.Context(), rollout.Latents[ensemble.TablesProducer])
		if err != nil {
			t.Fatal(err)
		}
		producer := evidence.Producer
		if producer == nil || relative(producer.Image, pictures[0].Image) > 1e-4 || len(producer.Top) != topClasses ||
			math.Abs(producer.Top[0].Probability-pictures[0].Probabilities[producer.Top[0].Class]) > 1e-5 {
			t.Errorf("producer %+v", producer)
		}
	}
	old := open(t, tiny, Options{Threads: 1})
	if evidence, err := old.Evidence(t.Context(), Request{Key: "a"}); err != nil || evidence.Producer != nil {
		t.Errorf("format 1: producer %v, %v", evidence.Producer, err)
	}
}

// As requested, every measurement takes the event's steps. Tables and guidance stay.
func TestWithSamplerOfFormat2(t *testing.T) {
	e, _ := fakeSamplerOf(t, tiny2, 64, 1, nil)
	p := e.Profile().WithSampler(e.ensemble.Diffusion, 12, 5, 0.5)
	want := "ddim g=5 eta=0.5 class_gap=paide-w2@0+1/12:posterior:shared request_risk=mean-w2@0+8/12:members:shared " +
		"image_risk=judge@0+9/12:producer:own"
	if p.Settings() != want || e.Validate(Request{Profile: p}) != nil {
		t.Errorf("settings %q, want %q; %v", p.Settings(), want, e.Validate(Request{Profile: p}))
	}
}

// BenchmarkPictures is what one image through decoder and judge costs in CPU time, for a caller alone and for many, as
// rows of the backbone.
func BenchmarkPictures(b *testing.B) {
	e := open(b, shipped, Options{Threads: 1})
	latent := [][]float32{probeLatent(e.ensemble)}
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			var next atomic.Int64
			var wg sync.WaitGroup
			spent := cpuTime(b)
			for range callers {
				wg.Go(func() {
					for next.Add(1) <= int64(b.N) {
						if _, err := e.Pictures(context.Background(), latent); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			picture := float64((cpuTime(b) - spent).Nanoseconds()) / float64(b.N)
			b.ReportMetric(picture/1e6, "cpu-ms/picture")
			b.ReportMetric(picture/rowTime(b, e), "rows/picture")
		})
	}
}

// rowTime returns the CPU time of a row of the backbone in nanoseconds.
func rowTime(b *testing.B, e *Engine) float64 {
	b.Helper()
	spent, rows := cpuTime(b), 0
	var wg sync.WaitGroup
	for i := range 64 {
		r := Request{Key: fmt.Sprint(i), Profile: profileOf(10, 2, 0, 9)}
		rows += e.Rows(r)
		wg.Go(func() {
			if _, err := e.Score(context.Background(), r); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	return float64((cpuTime(b) - spent).Nanoseconds()) / float64(rows)
}

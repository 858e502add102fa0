package scoring

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// checkAgree compares all numbers of two results of one request, and returns the largest relative difference.
func checkAgree(t *testing.T, name string, have, want Result) (worst float64) {
	t.Helper()
	pairs := [][2]float64{
		{have.ClassGap.Value, want.ClassGap.Value}, {have.ClassGap.MeanDistance, want.ClassGap.MeanDistance},
		{have.RequestRisk.Value, want.RequestRisk.Value}, {have.RequestRisk.MeanDistance, want.RequestRisk.MeanDistance},
	}
	for i, row := range want.RequestRisk.Distances {
		for j := range row {
			pairs = append(pairs, [2]float64{have.RequestRisk.Distances[i][j], row[j]})
		}
	}
	if (have.ImageRisk == nil) != (want.ImageRisk == nil) {
		t.Errorf("%s: image risk %v, want %v", name, have.ImageRisk, want.ImageRisk)
	} else if want.ImageRisk != nil {
		pairs = append(pairs, [2]float64{have.ImageRisk.Value, want.ImageRisk.Value})
	}
	for _, pair := range pairs {
		if !Agrees(pair[0], pair[1]) {
			t.Errorf("%s: %v, want %v", name, pair[0], pair[1])
		}
		if pair[0] != pair[1] {
			worst = max(worst, math.Abs(pair[0]-pair[1])/max(math.Abs(pair[0]), math.Abs(pair[1])))
		}
	}
	return worst
}

// scoreTogether scores requests at once.
func scoreTogether(t *testing.T, e *Engine, requests []Request) []Result {
	t.Helper()
	results := make([]Result, len(requests))
	var wg sync.WaitGroup
	for i, r := range requests {
		wg.Go(func() {
			var err error
			if results[i], err = e.Score(t.Context(), r); err != nil {
				t.Errorf("request %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	return results
}

func deviceRequests(e *Engine, n int) []Request {
	requests := make([]Request, n)
	for i := range requests {
		requests[i] = Request{Key: fmt.Sprint("device\n", i), Class: i % len(e.Ensemble().Classes), Seed: uint64(7000 + i)}
		if i%4 == 3 { // as the event's sampler asks
			requests[i].Profile = e.Profile().WithSampler(e.Ensemble().Diffusion, 12, 3, 0.5)
		}
	}
	return requests
}

// What a CPU scored, the device scores again within Tolerance.
func TestReceiptsReplayOnTheDevice(t *testing.T) {
	cpu := open(t, shipped, Options{Device: "cpu", Threads: 1})
	requests := deviceRequests(cpu, 24)
	want := scoreTogether(t, cpu, requests)
	have := scoreTogether(t, open(t, shipped, Options{}), requests)
	worst := 0.0
	for i := range requests {
		worst = max(worst, checkAgree(t, fmt.Sprintf("request %d on %s", i, device), have[i], want[i]))
	}
	t.Logf("largest relative difference between cpu and %s: %.1e; tolerance %.0e", device, worst, Tolerance)
}

// A score does not depend on the size to which its runs are padded.
func TestBucketInvariance(t *testing.T) {
	sizes := []int{8, 32}
	if device != "cpu" {
		sizes = []int{8, 16, 32, 64, 128, 256}
	}
	var requests []Request
	var want []Result
	worst := 0.0
	for _, size := range sizes {
		e := open(t, shipped, Options{MaxBatchRows: size, Buckets: []int{size}, Threads: 1})
		if requests == nil {
			requests = deviceRequests(e, 8)
			for _, r := range requests { // alone
				want = append(want, scoreTogether(t, e, []Request{r})...)
			}
		}
		for i, have := range scoreTogether(t, e, requests) {
			worst = max(worst, checkAgree(t, fmt.Sprintf("request %d in runs of %d rows", i, size), have, want[i]))
		}
	}
	t.Logf("largest relative difference between runs of %v rows: %.1e; tolerance %.0e", sizes, worst, Tolerance)
}

// A request whose rows the backbone turns into NaN fails alone, by name; its neighbours, the device and later requests
// are well.
func TestNonFiniteRowsOnTheDevice(t *testing.T) {
	e := open(t, tiny, Options{Threads: 1})
	for m := range e.ensemble.Components {
		row := e.ensemble.Members().Row(m, 2)
		for i := range row {
			row[i] = float32(math.Inf(1))
		}
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			_, err := e.Score(t.Context(), Request{Key: fmt.Sprint(i), Class: 1 + i%2})
			var nonFinite *NonFiniteError
			if bad := errors.As(err, &nonFinite); bad != (i%2 == 1) || !bad && err != nil {
				t.Errorf("request %d of class %d: %v", i, 1+i%2, err)
			}
		})
	}
	wg.Wait()
	if err := e.Check(t.Context(), 0); err != nil {
		t.Error(err)
	}
}

// A request whose deadline passes while its runs are on the device ends soon after it, and the device goes on.
func TestDeadlineOnTheDevice(t *testing.T) {
	e := open(t, tiny, Options{Threads: 1})
	endless := profileOf(900, 2, 899, 899)
	for i := range 8 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+i)*time.Millisecond)
		_, err := e.Score(ctx, Request{Key: fmt.Sprint(i), Profile: endless})
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("request %d: %v", i, err)
		}
		if err := e.Check(t.Context(), 0); err != nil {
			t.Error(err)
		}
	}
	if _, err := e.Score(t.Context(), Request{Key: "after"}); err != nil {
		t.Error(err)
	}
}

// An engine that does not fit the GPU memory it may have is refused, and another opens after it.
func TestMemoryLimitOnTheDevice(t *testing.T) {
	o := Options{Device: device, Threads: 1, MemoryLimit: 1 << 16}
	e, err := Open(shipped, o)
	t.Logf("64 KiB of memory on %s: %v", device, err)
	if err == nil {
		if closing := e.Close(); closing != nil {
			t.Error(closing)
		}
	}
	if (device == "cpu") != (err == nil) { // the limit is of GPU memory
		t.Errorf("a limit of 64 KiB on %s: error %v", device, err)
	}
	o.MemoryLimit = 2 << 30
	if e, err = Open(shipped, o); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// fp16Bound is how far a half-precision backbone may lie from PyTorch's in single precision, as the exporter's check.
const fp16Bound = 2e-2

// The sampler gives what PyTorch gives for the ensemble that DECUWATCH_TEST_ENSEMBLE names, with its golden.json; for
// the smallest one if nothing does.
func TestGoldenOfEnsemble(t *testing.T) {
	dir := cmp.Or(os.Getenv("DECUWATCH_TEST_ENSEMBLE"), tiny)
	golden := readGolden(t, dir)
	e := open(t, dir, Options{MaxBatchRows: 16})
	bound := 1e-4
	if e.Ensemble().Precision == "fp16" {
		bound = fp16Bound
	}
	worst := 0.0
	for i, c := range golden.Cases {
		if cmp.Or(c.Mode, ensemble.GuidanceOwn) != ensemble.GuidanceOwn {
			continue
		}
		measure := at(c.Steps, c.Branch, c.Rollout, ensemble.PaiDEW2)
		measure.Tables = cmp.Or(c.Tables, ensemble.TablesMembers)
		p, err := newPlan(e.ensemble, Profile{GuidanceScale: c.Guidance, Eta: c.Eta}, []Measure{measure})
		if err != nil {
			t.Fatal(err)
		}
		f, _, err := e.run(t.Context(), Request{Key: c.Key, Class: c.Class, Seed: c.Seed, Noise: "torch-cpu"}, p)
		if err != nil {
			t.Fatal(err)
		}
		for m, want := range c.Means {
			difference := relative(f.means[0][m], want)
			if worst = max(worst, difference); !(difference <= bound) {
				t.Errorf("case %d: mean of component %d differs by %.1e, at most %.0e", i, m, difference, bound)
			}
		}
		e.sampler.release(f)
	}
	t.Logf("%s in %s on %s: means differ by %.1e", e.Ensemble().Name, e.Ensemble().Precision, device, worst)
}

package scoring

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// A score does not depend on the rows that share its runs, beyond Tolerance.
func TestBatchInvariance(t *testing.T) {
	requests := make([]Request, 12)
	for i := range requests {
		requests[i] = Request{Key: fmt.Sprint("invariance\n", i), Class: i % 10, Seed: uint64(1000 + i)}
	}
	alone := make([]Result, len(requests))
	reference := open(t, shipped, Options{Threads: 1})
	for i, r := range requests {
		var err error
		if alone[i], err = reference.Score(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	worst := 0.0
	for _, o := range []Options{
		{},
		{MaxBatchRows: 7},
		{MaxBatchRows: 200, Threads: 1},
		{Sessions: 2, Threads: 1},
		{MaxBatchRows: 32, Buckets: []int{16, 32}},
	} {
		e := open(t, shipped, o)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i, r := range requests {
			wg.Go(func() {
				result, err := e.Score(t.Context(), r)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				for _, pair := range [][2]float64{
					{result.ClassGap.Value, alone[i].ClassGap.Value},
					{result.RequestRisk.Value, alone[i].RequestRisk.Value},
					{result.RequestRisk.MeanDistance, alone[i].RequestRisk.MeanDistance},
				} {
					worst = max(worst, math.Abs(pair[0]-pair[1])/math.Abs(pair[1]))
					if !Agrees(pair[0], pair[1]) {
						t.Errorf("request %d: %v among others, %v alone", i, pair[0], pair[1])
					}
				}
			})
		}
		wg.Wait()
	}
	t.Logf("largest relative difference of a score: %.1e; tolerance %.0e", worst, Tolerance)
}

// The same request, alone in its runs, gives the same bits.
func TestScoreIsReproducible(t *testing.T) {
	e := open(t, tiny, Options{Threads: 1})
	r := Request{Key: "a\n1", Class: 2, Seed: 1 << 63}
	first, err := e.Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	second, err := e.Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if first.ClassGap.Value != second.ClassGap.Value || first.RequestRisk.Value != second.RequestRisk.Value {
		t.Errorf("%v and %v, then %v and %v", first.ClassGap.Value, first.RequestRisk.Value, second.ClassGap.Value,
			second.RequestRisk.Value)
	}
	receipt := first.Receipt
	if receipt.EnsembleDigest != e.Ensemble().Digest || receipt.Profile != ProfileFixed ||
		receipt.Settings != e.Profile().Settings() ||
		receipt.Noise != "torch-cpu" || receipt.Seed != 1<<63 || receipt.Rows != e.Rows(r) ||
		!strings.HasPrefix(receipt.Runtime, "onnxruntime 1.") || receipt.Device != device {
		t.Errorf("receipt %+v", receipt)
	}
	if receipt.Carrier != Carrier(r.Key, 3) {
		t.Errorf("carrier %d", receipt.Carrier)
	}
}

// A sampler of CompVis that is asked for 30 steps takes 31. Scores, roll-outs, evidence and their rows count them all.
func TestCompVisTakesMoreStepsThanItIsAskedFor(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(tiny)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, ensemble.ManifestName)
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(content, []byte(`"timestep_spacing": "leading"`), []byte(`"timestep_spacing": "compvis"`), 1)
	if err := os.WriteFile(file, changed, 0o600); err != nil {
		t.Fatal(err)
	}
	e := open(t, dir, Options{Threads: 1})
	whole := Profile{GuidanceScale: 1, ClassGap: at(10, 0, 1, ensemble.PaiDEW2),
		RequestRisk: at(10, 0, 10, ensemble.MeanW2)}
	r := Request{Key: "a\n1", Seed: 3, Profile: whole.WithSampler(e.Ensemble().Diffusion, 30, 1, 0)}
	m := e.Ensemble().Components
	result, err := e.Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if risk := result.RequestRisk; risk.RolloutSteps != 31 || result.Receipt.Steps != 30 || result.Receipt.Rows != 31*m {
		t.Errorf("%d steps of a roll-out, %d in the receipt, %d rows", risk.RolloutSteps, result.Receipt.Steps,
			result.Receipt.Rows)
	}
	rollout, err := e.Rollout(t.Context(), r, ensemble.TablesMembers)
	if err != nil {
		t.Fatal(err)
	}
	evidence, err := e.Evidence(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	distance := 0.0
	for i, v := range rollout.Latents[ensemble.TablesMembers][0] {
		d := float64(v) - float64(rollout.Latents[ensemble.TablesMembers][1][i])
		distance += d * d
	}
	if !Agrees(distance, result.RequestRisk.Distances[0][1]) || !Agrees(distance, evidence.Final.Distances[0][1]) {
		t.Errorf("final latents are %v apart, the score says %v, the evidence %v",
			distance, result.RequestRisk.Distances[0][1], evidence.Final.Distances[0][1])
	}
	if last := evidence.Trajectory[len(evidence.Trajectory)-1]; last.BranchStep != 30 {
		t.Errorf("the trajectory ends at step %d, want 30", last.BranchStep)
	}
}

// Every part of a result is finite and within its bounds, for every estimator, generator and sampler.
func TestResultsAreInBounds(t *testing.T) {
	e := open(t, tinyTokens, Options{Threads: 1})
	m := e.Ensemble().Components
	for _, estimator := range []string{ensemble.PaiDEW2, ensemble.PaiDEKL, ensemble.PaiDEBhattacharyya, ensemble.MeanW2,
		ensemble.PixelPaiDEW2} {
		for i, noise := range []string{"", "torch-cpu", "torch-cuda", "decuwatch"} {
			for _, eta := range []float64{0, 0.7, 1} {
				p := Profile{GuidanceScale: float64(i), Eta: eta, ClassGap: at(8, 0, 8, estimator),
					RequestRisk: at(8, 3, 2, estimator)}
				result, err := e.Score(t.Context(), Request{Key: estimator, Class: i, Seed: uint64(i), Noise: noise, Profile: p})
				if err != nil {
					t.Fatal(err)
				}
				if result.Receipt.Profile != ProfileAsRequested || result.Receipt.Eta != eta {
					t.Errorf("receipt %+v", result.Receipt)
				}
				for _, r := range []Measurement{result.ClassGap, *result.RequestRisk} {
					bound := math.Inf(1)
					if estimator != ensemble.MeanW2 {
						if bound = math.Log(float64(m)); r.UpperBound != bound {
							t.Errorf("%s: upper bound %v", estimator, r.UpperBound)
						}
					}
					if !(r.Value >= 0 && r.Value <= bound) || !(r.MeanDistance >= 0) || math.IsInf(r.MeanDistance, 0) {
						t.Errorf("%s: value %v, mean distance %v", estimator, r.Value, r.MeanDistance)
					}
					sum := 0.0
					for j := range m {
						sum += r.Shares[j]
						if r.Distances[j][j] != 0 {
							t.Errorf("distance of a component to itself: %v", r.Distances[j][j])
						}
					}
					if math.Abs(sum-1) > 1e-9 {
						t.Errorf("shares sum to %v", sum)
					}
				}
			}
		}
	}
}

func TestScoreRefuses(t *testing.T) {
	e := open(t, tiny, Options{Threads: 1, MaxRequestRows: 500})
	good := Request{Key: "a", Class: 1}
	with := func(change func(*Request)) Request {
		r := good
		change(&r)
		return r
	}
	profile := func(change func(*Profile)) Request {
		return with(func(r *Request) {
			r.Profile = e.Profile()
			change(&r.Profile)
		})
	}
	for _, c := range []struct {
		name    string
		request Request
		want    error
		says    string
	}{
		{"class below", with(func(r *Request) { r.Class = -1 }), ErrUnknownClass, "-1"},
		{"class above", with(func(r *Request) { r.Class = 4 }), ErrUnknownClass, "0 to 3"},
		{"generator", with(func(r *Request) { r.Noise = "numpy" }), ErrNoise, "numpy"},
		{"steps", profile(func(p *Profile) { p.ClassGap.Steps = 1e9 }), ErrSettings, "steps is 1000000000"},
		{"guidance", profile(func(p *Profile) { p.GuidanceScale = math.NaN() }), ErrSettings, "guidance_scale is NaN"},
		{"eta", profile(func(p *Profile) { p.Eta = 1.5 }), ErrSettings, "eta is 1.5"},
		{"branch", profile(func(p *Profile) { p.RequestRisk.BranchStep = 10 }), ErrSettings, "request_risk.branch_step"},
		{"timestep past training", profile(func(p *Profile) { p.ClassGap.Steps = 1000 }), ErrSettings, "timestep 1000"},
		{"rows", profile(func(p *Profile) { *p = p.WithSampler(Diffusion{}, 500, 2, 0) }), ErrTooLarge, "at most 500"},
		{"priority", with(func(r *Request) { r.Priority = 7 }), ErrSettings, "priority"},
	} {
		_, err := e.Score(t.Context(), c.request)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error is %v", c.name, err)
		}
		if before := e.Validate(c.request); fmt.Sprint(before) != fmt.Sprint(err) {
			t.Errorf("%s: Validate returns %v, Score %v", c.name, before, err)
		}
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Score(cancelled, good); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
	if _, err := e.Score(t.Context(), good); err != nil || e.Validate(good) != nil {
		t.Errorf("after all of it: %v, %v", err, e.Validate(good))
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		path    string
		options Options
		says    string
	}{
		"no ensemble": {t.TempDir(), Options{}, "ensemble.json"},
		"no library":  {tiny, Options{Library: "/no/such/file"}, "/no/such/file"},
		"device":      {tiny, Options{Device: "tpu"}, "tpu"},
		"batch":       {tiny, Options{MaxBatchRows: 1}, "scoring.max-batch-rows"},
		"buckets":     {tiny, Options{MaxBatchRows: 8, Buckets: []int{4, 2, 8}}, "Buckets"},
		"profile":     {tiny, Options{Profile: Profile{GuidanceScale: 3}}, "fixed profile"},
		// The CPU build of ONNX Runtime has no CUDA: the device is refused with its name, not passed over.
		// A GPU that is not there is refused likewise.
		"cuda": {tiny, Options{Device: "cuda:99"}, "cuda:99"},
	} {
		e, err := Open(c.path, c.options)
		if err == nil {
			t.Errorf("%s: was opened", name)
			_ = e.Close()
			continue
		}
		if !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %q does not say %q", name, err, c.says)
		}
	}
}

// Requests that are given up leave the engine as it was, and Close ends the others.
func TestCancellationAndCloseUnderLoad(t *testing.T) {
	e, err := Open(shipped, Options{Device: device})
	if err != nil {
		t.Fatal(err)
	}
	roll := e.Profile()
	roll.RequestRisk = at(roll.RequestRisk.Steps, 0, roll.RequestRisk.Steps, ensemble.MeanW2)
	var wg sync.WaitGroup
	for i := range 12 {
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			_, err := e.Score(ctx, Request{Key: fmt.Sprint(i), Profile: roll, Priority: Priority(i % 2)})
			if i%3 == 0 && err != nil && !errors.Is(err, context.Canceled) || i%3 != 0 && err != nil {
				t.Errorf("request %d: %v", i, err)
			}
		})
		if i%3 == 0 {
			cancel()
		}
		defer cancel()
	}
	wg.Wait()
	for i := range 6 {
		wg.Go(func() {
			if _, err := e.Score(t.Context(), Request{Key: fmt.Sprint(i), Profile: roll}); err != nil &&
				!errors.Is(err, ErrClosed) {
				t.Error(err)
			}
		})
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if _, err := e.Score(t.Context(), Request{Key: "late"}); !errors.Is(err, ErrClosed) {
		t.Errorf("after close: %v", err)
	}
	if _, err := e.Evidence(t.Context(), Request{Key: "late"}); !errors.Is(err, ErrClosed) {
		t.Errorf("evidence after close: %v", err)
	}
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	e := open(t, tiny, Options{Threads: 1, Registerer: registry})
	r := Request{Key: "a"}
	if _, err := e.Score(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	r.Priority = Background
	if _, err := e.Score(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	// The last run is counted before the score is given out.
	want := fmt.Sprintf(`
# HELP decuwatch_sampler_rows_total Rows of backbone work done, by kind: live, background, padding.
# TYPE decuwatch_sampler_rows_total counter
decuwatch_sampler_rows_total{kind="background",model="tiny"} %[1]d
decuwatch_sampler_rows_total{kind="live",model="tiny"} %[1]d
decuwatch_sampler_rows_total{kind="padding",model="tiny"} 0
# HELP decuwatch_sampler_queue_rows Rows of backbone work that accepted requests still need.
# TYPE decuwatch_sampler_queue_rows gauge
decuwatch_sampler_queue_rows{model="tiny"} 0
# HELP decuwatch_sampler_requests Requests that wait or run in the sampler.
# TYPE decuwatch_sampler_requests gauge
decuwatch_sampler_requests{model="tiny"} 0
`, e.Rows(r))
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "decuwatch_sampler_rows_total",
		"decuwatch_sampler_queue_rows", "decuwatch_sampler_requests"); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

// A graph whose weights lie in external data files scores as the one that holds them itself.
func TestExternalData(t *testing.T) {
	r := Request{Key: "a", Class: 1, Seed: 3}
	inside, err := open(t, tiny, Options{Threads: 1}).Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	outside, err := open(t, "testdata/tiny-external", Options{Threads: 1}).Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if !Agrees(inside.ClassGap.Value, outside.ClassGap.Value) ||
		!Agrees(inside.RequestRisk.Value, outside.RequestRisk.Value) {
		t.Errorf("%v and %v, with external data %v and %v", inside.ClassGap.Value, inside.RequestRisk.Value,
			outside.ClassGap.Value, outside.RequestRisk.Value)
	}
}

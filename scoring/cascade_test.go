package scoring

import (
	"errors"
	"math"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// A request below its cut is measured as without one, but for its request risk, and its runs hold the rows of the rest
// alone. A request that is not below costs and measures what it would without a cut. That holds for every kind of
// profile, among other requests, and with several sessions.
func TestCascade(t *testing.T) {
	for _, path := range []string{tiny, tiny2, shipped} {
		for _, o := range []Options{{Threads: 1}, {Threads: 1, MaxBatchRows: 16, Sessions: 2}} {
			e := open(t, path, o)
			profiles := []Profile{{}, profileOf(7, 2, 0, 5), profileOf(7, 2, 3, 3), profileOf(7, 1, 4, 0)}
			if path == tiny2 {
				profiles = append(profiles, profiles2(e)...)
			}
			var requests []Request
			for i, p := range profiles {
				for class := range 3 {
					requests = append(requests, Request{Key: "cascade", Class: class, Seed: uint64(i), Profile: p})
				}
			}
			full := make([]Result, len(requests))
			for i, r := range requests {
				full[i] = score(t, e, r)
			}
			before := counted(e, Live)
			var mu sync.Mutex
			var wg sync.WaitGroup
			rows := 0
			for i, r := range requests {
				for _, cut := range []float64{math.MaxFloat64, full[i].ClassGap.Value / 2} {
					r := r
					r.Cut = cut
					wg.Go(func() {
						have, err := e.Score(t.Context(), r)
						if err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						defer mu.Unlock()
						rows += have.Receipt.Rows
						checkCascade(t, e, r, have, full[i])
					})
				}
			}
			wg.Wait()
			if queued := testutil.ToFloat64(e.sampler.metrics.queued); queued != 0 {
				t.Errorf("%s: %v rows are still queued", path, queued)
			}
			if ran := counted(e, Live) - before; ran != rows {
				t.Errorf("%s: %d rows ran, the receipts say %d", path, ran, rows)
			}
		}
	}
}

// checkCascade compares the score of a request that has a cut with its score without one.
func checkCascade(t *testing.T, e *Engine, r Request, have, full Result) {
	t.Helper()
	if !Agrees(have.ClassGap.Value, full.ClassGap.Value) {
		t.Errorf("class gap is %v, without a cut %v", have.ClassGap.Value, full.ClassGap.Value)
	}
	if (have.ImageRisk == nil) != (full.ImageRisk == nil) ||
		have.ImageRisk != nil && !Agrees(have.ImageRisk.Value, full.ImageRisk.Value) {
		t.Errorf("image risk is %v, without a cut %v", have.ImageRisk, full.ImageRisk)
	}
	if full.ClassGap.Value >= r.Cut {
		if have.RequestRisk == nil || have.RequestRiskReason != "" || have.Receipt.Rows != full.Receipt.Rows ||
			!Agrees(have.RequestRisk.Value, full.RequestRisk.Value) {
			t.Errorf("above the cut: %+v, without a cut %+v", have, full)
		}
		return
	}
	p, _, err := e.work(r)
	if err != nil {
		t.Fatal(err)
	}
	if have.RequestRisk != nil || have.RequestRiskReason != ReasonBelowCut || have.Receipt.Rows != p.rowsStopped ||
		p.rowsStopped > p.rows || have.Receipt.Settings != full.Receipt.Settings {
		t.Errorf("below the cut: %+v, without a cut %+v", have, full)
	}
}

// A cascade spares the rows of the request risk: in the shipped ensemble all but those of the class gap and the image
// risk.
func TestCascadeRows(t *testing.T) {
	e := open(t, shipped, Options{})
	p := e.Profile()
	gap, err := newPlan(e.ensemble, p, []Measure{p.ClassGap, p.ImageRisk})
	if err != nil {
		t.Fatal(err)
	}
	r := Request{Key: "a", Cut: math.MaxFloat64}
	if have := score(t, e, r).Receipt.Rows; have != gap.rows || have >= e.Rows(r) {
		t.Errorf("%d rows of %d, want %d", have, e.Rows(r), gap.rows)
	}
}

func TestCutOutOfBounds(t *testing.T) {
	e := open(t, tiny, Options{})
	for _, cut := range []float64{-1, math.NaN(), math.Inf(-1)} {
		if _, err := e.Score(t.Context(), Request{Cut: cut}); !errors.Is(err, ErrSettings) {
			t.Errorf("cut %v: %v", cut, err)
		}
	}
	for _, c := range []ensemble.Cascade{{Share: 0.5}, {Cut: -1}, {Cut: 1, Share: 1.1}, {Cut: 1, Share: -0.1},
		{Cut: math.NaN()}, {Cut: math.Inf(1)}, {Cut: 1, Share: math.NaN()}} {
		if c.Validate() == nil {
			t.Errorf("%+v is valid", c)
		}
	}
}

func score(t *testing.T, e *Engine, r Request) Result {
	t.Helper()
	result, err := e.Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

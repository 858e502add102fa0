package scoring

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// BenchmarkCascade runs requests spread evenly over the classes of the shipped ensemble, whole and with cascades that
// stop the given shares of them, but for one in twenty. It reports rows per event, beside them as a share of the whole
// profile's, and how many of the whole profile's request-risk alerts the cascade misses: with thresholds at a
// false-alarm rate of 5% by class, and with one for all classes.
func BenchmarkCascade(b *testing.B) {
	const perClass, alpha, share = 40, 0.05, 0.05
	e, err := Open(shipped, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := e.Close(); err != nil {
			b.Error(err)
		}
	}()
	var requests []Request
	for class := range e.ensemble.Classes {
		for i := range perClass {
			requests = append(requests, Request{Key: fmt.Sprint("cascade\n", class, i), Class: class, Seed: uint64(i)})
		}
	}
	whole := scoreAll(b, e, requests)
	byClass, byModel := alarms(whole, requests, alpha, true), alarms(whole, requests, alpha, false)
	gaps := make([]float64, len(whole))
	for i, r := range whole {
		gaps[i] = r.ClassGap.Value
	}
	slices.Sort(gaps)
	for _, stopped := range []float64{0, 0.25, 0.5, 0.75} {
		b.Run(fmt.Sprintf("stopped=%g", stopped), func(b *testing.B) {
			draws := rand.New(rand.NewPCG(1, 2))
			cascaded := slices.Clone(requests)
			for i := range cascaded {
				if stopped > 0 && draws.Float64() >= share {
					cascaded[i].Cut = gaps[int(stopped*float64(len(gaps)))]
				}
			}
			for b.Loop() {
				results := scoreAll(b, e, cascaded)
				rows, full := 0, 0
				for i, r := range results {
					rows, full = rows+r.Receipt.Rows, full+whole[i].Receipt.Rows
				}
				n := float64(len(results))
				b.ReportMetric(float64(rows)/n, "rows/event")
				b.ReportMetric(float64(rows)/float64(full), "of-whole")
				b.ReportMetric(missed(byClass, results), "missed-by-class")
				b.ReportMetric(missed(byModel, results), "missed-by-model")
			}
		})
	}
}

// scoreAll scores requests together.
func scoreAll(b *testing.B, e *Engine, requests []Request) []Result {
	results, errs := make([]Result, len(requests)), make([]error, len(requests))
	var wg sync.WaitGroup
	for i, r := range requests {
		wg.Go(func() { results[i], errs[i] = e.Score(b.Context(), r) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			b.Fatal(err)
		}
	}
	return results
}

// alarms returns which request risks reach the quantile 1 - alpha, of their class or of all.
func alarms(results []Result, requests []Request, alpha float64, byClass bool) []bool {
	values := map[int][]float64{}
	group := func(i int) int {
		if byClass {
			return requests[i].Class
		}
		return 0
	}
	for i, r := range results {
		values[group(i)] = append(values[group(i)], r.RequestRisk.Value)
	}
	for _, v := range values {
		slices.Sort(v)
	}
	fired := make([]bool, len(results))
	for i, r := range results {
		v := values[group(i)]
		fired[i] = r.RequestRisk.Value >= v[int((1-alpha)*float64(len(v)))]
	}
	return fired
}

// missed returns the share of alarms on which the request risk was not measured.
func missed(alarms []bool, results []Result) float64 {
	lost, all := 0, 0
	for i, fired := range alarms {
		if fired {
			all++
			if results[i].RequestRisk == nil {
				lost++
			}
		}
	}
	return float64(lost) / float64(all)
}

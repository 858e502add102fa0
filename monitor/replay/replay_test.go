package replay

import (
	"errors"
	"math"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

func result() scoring.Result {
	measurement := func(step, rollout int, estimator string) scoring.Measurement {
		return scoring.Measurement{
			BranchStep: step, RolloutSteps: rollout, Estimator: estimator, Value: 2, MeanDistance: 3,
			Distances: [][]float64{{4, 5}, {6}},
		}
	}
	return scoring.Result{
		ClassGap: measurement(1, 2, "paide-w2"), RequestRisk: new(measurement(3, 4, "mean-w2")),
		Receipt: scoring.Receipt{Carrier: 1, Seed: 7, Noise: "torch-cpu", Steps: 20, GuidanceScale: 2.5, Eta: 0.5},
	}
}

func stored() *schema.Score {
	event := schema.Event{Source: "/tests", ID: "one"}
	s := monitor.Compose(event, 3, "Dress", result(), []string{"noise: replaced"}, time.Unix(1, 0))
	return &s
}

// The receipt holds every field of the request but the priority.
func TestRequest(t *testing.T) {
	want := scoring.Request{
		Key: monitor.Key("/tests", "one"), Class: 3, Seed: 7, Noise: "torch-cpu", Priority: scoring.Background,
		Profile: scoring.Profile{
			GuidanceScale: 2.5, Eta: 0.5,
			ClassGap: scoring.Measure{
				Tables: "members", Steps: 20, Guidance: "own", BranchStep: 1, RolloutSteps: 2, Estimator: "paide-w2",
			},
			RequestRisk: scoring.Measure{
				Tables: "members", Steps: 20, Guidance: "own", BranchStep: 3, RolloutSteps: 4, Estimator: "mean-w2",
			},
		},
	}
	got, err := Request(stored())
	if err != nil || got != want {
		t.Errorf("request is %+v (%v), want %+v", got, err, want)
	}
	// What a cascade spared is measured as the settings say.
	spared := stored()
	spared.RequestRisk = nil
	spared.Receipt.Settings = want.Profile.Settings()
	if got, err = Request(spared); err != nil || got != want {
		t.Errorf("request is %+v (%v), want %+v", got, err, want)
	}
	spared.Receipt.Settings = "none"
	if _, err = Request(spared); !errors.Is(err, scoring.ErrSettings) {
		t.Errorf("settings of no profile: %v", err)
	}
}

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name       string
		change     func(*scoring.Result)
		agrees     bool
		difference float64
	}{
		{"nothing", func(*scoring.Result) {}, true, 0},
		{"a value within the tolerance", func(r *scoring.Result) { r.ClassGap.Value *= 1.0005 }, true, 1 - 1/1.0005},
		{"a value", func(r *scoring.Result) { r.ClassGap.Value = 4 }, false, 0.5},
		{"a mean distance", func(r *scoring.Result) { r.RequestRisk.MeanDistance = 4 }, false, 0.25},
		{"one distance", func(r *scoring.Result) { r.RequestRisk.Distances[1][0] = 8 }, false, 0.25},
		{"the shape", func(r *scoring.Result) { r.RequestRisk.Distances = [][]float64{{4}, {5, 6}} }, false, math.MaxFloat64},
		{"the number of distances", func(r *scoring.Result) { r.ClassGap.Distances = nil }, false, math.MaxFloat64},
		{"the carrier", func(r *scoring.Result) { r.Receipt.Carrier = 2 }, false, 0},
	} {
		again := result()
		c.change(&again)
		r := Compare(stored(), again)
		if r.Agrees != c.agrees || math.Abs(r.Difference-c.difference) > 1e-12 {
			t.Errorf("%s differs: agrees %t, difference %g, want %t and %g", c.name, r.Agrees, r.Difference, c.agrees,
				c.difference)
		}
	}
}

package evaluation

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// newFinishedTrial returns a trial of two classes in two rotations with three seeds, whose requests have all been made.
func newFinishedTrial() *trial {
	e := alarmEnsemble()
	e.Classes = e.Classes[:2]
	risk := scoring.Measure{Tables: ensemble.TablesMembers, Steps: 3, Guidance: ensemble.GuidanceShared, RolloutSteps: 2,
		Estimator: ensemble.MeanW2}
	image := scoring.Measure{Tables: ensemble.TablesProducer, Steps: 4, Guidance: ensemble.GuidanceOwn, RolloutSteps: 3,
		Estimator: ensemble.EstimatorJudge}
	nan := math.NaN()
	data := func(neff float64) *ensemble.ClassData { return &ensemble.ClassData{NEff: neff} }
	return &trial{
		subject: &subject{path: "a", first: e,
			profiles: []scoring.Profile{{GuidanceScale: 2, RequestRisk: risk, ImageRisk: image}},
			truths: []truth{{dir: "t", Judge: &ensemble.Judge{Accuracy: []*float64{new(0.9), new(0.9)},
				LeastAccuracy: 0.6}}}},
		config: Config{Seeds: 3, ErrorSteps: 20, Alpha: 0.05},
		results: &Ensemble{Path: "a", Name: "m", Classes: 2, Requests: 12, Manifests: make([]Manifest, 2),
			Profiles: make([]Profile, 1)},
		cells:   cells,
		classes: []ensemble.Class{{Data: data(1)}, {Data: data(50)}, {Data: data(40)}, {Data: data(1)}},
		scores: []*observed{
			{name: schema.RequestRisk, measure: risk,
				values:    [][]float64{{1, 2, 3}, {1, 2, 3}, {3, 2, 1}, {1, 3, 2}},
				distances: matrix(4, 3), saturated: matrix(4, 3),
				firsts: [][][]float64{{{3, 2, 1}, {3, 2, 1}, {1, 2, 3}, {2, 1, 3}}}},
			{name: schema.ImageRisk, measure: image,
				values:    [][]float64{{0.9, 0.1, 0.8}, {0.3, 0.2, 0.1}, {nan, nan, nan}, {0.9, 0.95, 0.7}},
				distances: matrix(4, 3), saturated: matrix(4, 3)},
		},
		members: [][]float64{{1, 2, 3}, {1, 2, 3}, {3, 2, 1}, {1, 3, 2}},
		errors: [][][]float64{
			{{1, 2, 3}, {3, 2, 1}, {3, 2, 1}, {1, 2, 3}},
			{{1, 2, 3}, {3, 2, 1}, {3, 2, 1}, {1, 3, 2}},
		},
		own:   [][]float64{{0.9, 0.1, 0.8}, {0.3, 0.2, 0.1}, {0.5, 0.5, 0.5}, {0.9, 0.95, 0.7}},
		wrong: [][][]bool{{{true, false, true}, {false, false, false}, {true, true, true}, {false, true, false}}},
		alarms: []FalseAlarms{
			newFalseAlarms(schema.RequestRisk, 0.05, e.Labels()), newFalseAlarms(schema.ImageRisk, 0.05, e.Labels()),
		},
	}
}

// Scores are held against a producer that is not a member, beside the ceiling and the figure against their own members.
func TestJudge(t *testing.T) {
	trial := newFinishedTrial()
	trial.judge()
	r := trial.results
	risk, image := r.Scores[0], r.Scores[1]
	closeTo(t, "ceiling", r.Ceiling.Within.Value, (1+1+1+0.5)/4)
	closeTo(t, "request level", risk.RequestLevel.Within.Value, 1.5/4)
	closeTo(t, "of the ceiling", *risk.OfCeiling, 1.5/3.5)
	closeTo(t, "against its own members", risk.MembersLevel.Within.Value, 1)
	closeTo(t, "two members", risk.ByMembers[0].RequestLevel.Within.Value, (-1+1-1+0.5)/4)
	if risk.ByMembers[0].Rows != 2*(2+1) || risk.MeanDistance != nil {
		t.Errorf("request risk is %+v", risk)
	}
	// The third cell has no image risk: all scores are judged on the images of the other three.
	if r.Truths[0].Requests != 9 || image.Measured != 9 {
		t.Errorf("%d requests have a known image, %d an image risk", r.Truths[0].Requests, image.Measured)
	}
	closeTo(t, "wrong images of 1 image", r.Truths[0].Wrong[0].Mean.Value, 0.5)
	closeTo(t, "image level", image.ImageLevels[0].AUROC.Value, 16.5/18)
	closeTo(t, "image level within", image.ImageLevels[0].Within.Value, 1)
	closeTo(t, "judge on the image itself", r.Truths[0].Ceiling.AUROC.Value, 16.5/18)
	for name, want := range map[string]float64{"count": 1, "n_eff": 1} {
		for _, c := range r.Controls {
			if c.Name != name {
				continue
			}
			closeTo(t, name, c.ClassLevel.Against[0].AUROC.Value, want)
			closeTo(t, name+" within", c.ImageLevels[0].Within.Value, 0.5)
			if c.RequestLevel.Within != nil {
				t.Errorf("%s ranks the requests of a class: %+v", name, c.RequestLevel)
			}
		}
	}
	if len(r.Controls) != 3 {
		t.Errorf("controls are %+v", r.Controls)
	}
}

// Without producers there is only the old figure, and the text says what it is.
func TestJudgeWithoutProducers(t *testing.T) {
	trial := newFinishedTrial()
	trial.errors, trial.wrong = nil, nil
	trial.judge()
	r := trial.results
	if r.Ceiling != nil || r.Scores[0].RequestLevel != nil || r.Scores[0].OfCeiling != nil || r.Error.Producer != nil ||
		r.Scores[0].MembersLevel == nil || len(r.Truths) != 0 {
		t.Errorf("results are %+v", r)
	}
	var out bytes.Buffer
	if err := (&Results{Seeds: 3, Ensembles: []Ensemble{*r}}).Print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`no tensor "producers"`, "own members (old)", "Unknown: no judge was named"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the text does not say %q:\n%s", want, &out)
		}
	}
}

func TestSideBySide(t *testing.T) {
	one, other := newFinishedTrial(), newFinishedTrial()
	other.errors[0] = other.members // request level 1
	other.errors = other.errors[:1] // and no ceiling
	one.judge()
	other.judge()
	figures := map[string]Figure{}
	for _, f := range sideBySide([]Ensemble{*one.results, *other.results}) {
		if _, twice := figures[f.Name]; twice {
			t.Errorf("%s is there twice", f.Name)
		}
		figures[f.Name] = f
	}
	f := figures["request level, request_risk"]
	closeTo(t, "first", *f.Values[0], 1.5/4)
	closeTo(t, "second", *f.Values[1], 1)
	closeTo(t, "mean", *f.Mean, (1.5/4+1)/2)
	closeTo(t, "spread", *f.Spread, 1-1.5/4)
	if f := figures["request level, ceiling"]; f.Values[1] != nil || f.Spread != nil {
		t.Errorf("the ceiling of one ensemble is %+v", f)
	}
}

func TestMeanDistance(t *testing.T) {
	distances := [][]float64{{0, 1, 2}, {1, 0, 6}, {2, 6, 0}}
	closeTo(t, "of two", meanDistance(distances, 2), 1)
	closeTo(t, "of three", meanDistance(distances, 3), 3)
}

// Lines fit a terminal of 120 columns.
func TestPrintFits(t *testing.T) {
	trial := newFinishedTrial()
	for i := range trial.alarms {
		trial.alarms[i].All.add(alarms{scores: 160, alerts: 8, n: 100, achieved: 0.05})
		trial.alarms[i].Classes[0].add(alarms{scores: 160, alerts: 8, n: 100, achieved: 0.05})
	}
	trial.judge()
	var out bytes.Buffer
	if err := (&Results{Seeds: 3, Ensembles: []Ensemble{*trial.results}}).Print(&out); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out.String()) {
		if len([]rune(line)) > 121 {
			t.Errorf("%d columns: %s", len([]rune(line)), line)
		}
	}
	t.Log(out.String())
}

func TestMostLikely(t *testing.T) {
	for _, c := range []struct {
		probabilities []float64
		want          int
	}{{[]float64{0.2, 0.5, 0.3}, 1}, {[]float64{0.4, 0, 0.2}, 0}, {[]float64{0.3, 0, 0.3}, -1}} {
		if got := mostLikely(c.probabilities); got != c.want {
			t.Errorf("of %v the most likely is %d, want %d", c.probabilities, got, c.want)
		}
	}
}

// Cells share the seeds of their requests, but not of those that false alarms are counted on.
func TestSeeds(t *testing.T) {
	c := Config{Seeds: 2, AlarmSeeds: 3}
	seen := map[uint64]bool{}
	for cell := range 4 {
		for request := range c.scored() {
			seed := c.seed(cell, request)
			if request < c.Seeds {
				if seed != uint64(request) {
					t.Errorf("request %d of cell %d has seed %d", request, cell, seed)
				}
			} else if seen[seed] || seed < uint64(c.Seeds) {
				t.Errorf("seed %d of cell %d is there twice", seed, cell)
			}
			seen[seed] = true
		}
	}
}

package evaluation

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"
	"gonum.org/v1/gonum/stat"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Config says what is evaluated.
type Config struct {
	// Ensemble is one manifest, or a directory: its manifests of one backbone are rotations, the same classes with other
	// numbers of training images.
	Ensemble   string
	Options    scoring.Options // of each engine
	Profiles   []string        // see ParseProfile. Defaults to the manifest's profile
	Seeds      int             // requests of each class in each rotation, at least 2
	ErrorSteps int             // steps of the images whose errors are compared with scores
}

// Evaluation is a checked Config.
type Evaluation struct {
	config   Config
	paths    []string           // manifests
	first    *ensemble.Ensemble // of the first manifest
	profiles []scoring.Profile
	truth    scoring.Profile // of the images whose errors are compared with scores
}

// New checks the configuration and opens the first manifest. The error is a settings.Error if the configuration is
// wrong.
func New(c Config) (*Evaluation, error) {
	if c.Seeds < 2 {
		return nil, settings.Errorf("seeds is %d, must be at least 2", c.Seeds)
	}
	paths, err := rotations(c.Ensemble)
	if err != nil {
		return nil, err
	}
	first, err := ensemble.Open(paths[0])
	if err != nil {
		return nil, err
	}
	e := &Evaluation{config: c, paths: paths, first: first}
	for _, text := range c.Profiles {
		p, err := ParseProfile(text, &first.Manifest)
		if err != nil {
			return nil, settings.Errorf("profile %q: %w", text, err)
		}
		e.profiles = append(e.profiles, p)
	}
	if len(e.profiles) == 0 {
		e.profiles = []scoring.Profile{first.Profile}
	}
	e.truth = first.Profile.WithSampler(first.Diffusion, c.ErrorSteps, first.Profile.GuidanceScale, 0)
	if err := e.truth.Validate(&first.Manifest); err != nil {
		return nil, settings.Errorf("error-steps: %w", err)
	}
	return e, nil
}

// withError reports whether the requests' errors can be measured.
func (e *Evaluation) withError() bool { return e.first.Tables(ensemble.TablesReference) != nil }

// Requests returns how many requests Run makes.
func (e *Evaluation) Requests() int {
	n := len(e.profiles)
	if e.withError() {
		n++
	}
	return n * len(e.paths) * len(e.first.Classes) * e.config.Seeds
}

// Results is what an evaluation found.
type Results struct {
	Ensemble  string     `json:"ensemble"`
	Regime    string     `json:"regime"`
	Manifests []Manifest `json:"manifests"`
	Classes   int        `json:"classes"`
	Seeds     int        `json:"seeds"`
	Requests  int        `json:"requests"` // of each score
	Bins      []float64  `json:"bins"`     // training images
	Error     *Error     `json:"error"`    // null if the ensemble carries no reference table
	Scores    []Score    `json:"scores"`
	Random    ClassLevel `json:"random_scores"` // the control
}

// Manifest is one rotation.
type Manifest struct {
	File   string `json:"file"`
	Digest string `json:"digest"`
}

// Error describes the errors of the requests: squared distances of the final latents to the final latent under the
// backbone's own fully trained table, averaged over the components.
type Error struct {
	Steps    int       `json:"steps"`
	Guidance float64   `json:"guidance_scale"`
	Means    []BinMean `json:"mean_by_bin"`
}

// Score is one measurement of one profile.
type Score struct {
	Settings     string                 `json:"settings"` // of the sampler and the measurement
	Measurement  schema.MeasurementName `json:"measurement"`
	Rows         int                    `json:"rows"` // of U-Net work, of this measurement alone
	ProfileRows  int                    `json:"profile_rows"`
	Saturated    float64                `json:"saturated"` // share of scores at their upper bound
	ClassLevel   ClassLevel             `json:"class_level"`
	RequestLevel *RequestLevel          `json:"request_level"`
	// MeanDistance is the control of PaiDE: the plain mean of the same pairwise distances.
	MeanDistance Control `json:"mean_distance"`
}

// Control is both levels of a control.
type Control struct {
	ClassLevel   ClassLevel    `json:"class_level"`
	RequestLevel *RequestLevel `json:"request_level"`
}

// observed are the numbers of one measurement of one profile, or of the errors: [cells][seeds].
type observed struct {
	profile, alone               scoring.Profile // alone: both measurements are this one
	values, distances, saturated [][]float64
}

// trial is an evaluation in progress.
type trial struct {
	*Evaluation
	results *Results
	cells   []Cell
	scores  []*observed // of each profile, the class gap and the request risk
	errors  [][]float64 // [cells][seeds]
	done    func()
}

// Run runs every request under every profile, rotation by rotation, and judges the scores. It calls done after each
// request, from several goroutines.
func (e *Evaluation) Run(ctx context.Context, done func()) (*Results, error) {
	n := len(e.paths) * len(e.first.Classes)
	t := &trial{Evaluation: e, done: done, errors: matrix(n, e.config.Seeds), results: &Results{
		Ensemble: e.first.Name, Regime: e.first.Regime, Classes: len(e.first.Classes), Seeds: e.config.Seeds,
		Requests: n * e.config.Seeds,
	}}
	for _, p := range e.profiles {
		for i, m := range []scoring.Measure{p.ClassGap, p.RequestRisk} {
			alone := p
			alone.ClassGap, alone.RequestRisk = m, m
			t.scores = append(t.scores, &observed{
				p, alone, matrix(n, e.config.Seeds), matrix(n, e.config.Seeds), matrix(n, e.config.Seeds),
			})
			t.results.Scores = append(t.results.Scores, Score{
				Settings:    fmt.Sprintf("g=%g eta=%g %s", p.GuidanceScale, p.Eta, m),
				Measurement: schema.MeasurementNames()[i],
			})
		}
	}
	for i, path := range e.paths {
		if err := t.rotation(ctx, i, path); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	t.judge()
	return t.results, nil
}

// rotation runs the requests of one manifest.
func (t *trial) rotation(ctx context.Context, rotation int, path string) (err error) {
	engine, err := scoring.Open(path, t.config.Options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, engine.Close()) }()
	e := engine.Ensemble()
	if len(e.Classes) != len(t.first.Classes) || (e.Tables(ensemble.TablesReference) != nil) != t.withError() {
		return fmt.Errorf("%s has other classes than %s, or only one of them has a reference table", path, t.paths[0])
	}
	t.results.Manifests = append(t.results.Manifests, Manifest{filepath.Base(path), e.Digest})
	for i, o := range t.scores {
		t.results.Scores[i].Rows = engine.Rows(scoring.Request{Profile: o.alone})
		t.results.Scores[i].ProfileRows = engine.Rows(scoring.Request{Profile: o.profile})
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(64) // requests in flight fill the runs
	for class := range e.Classes {
		cell := len(t.cells)
		t.cells = append(t.cells, Cell{Rotation: rotation, Class: class, Bin: meanOf(e.Classes[class].Images)})
		for seed := range t.config.Seeds {
			r := scoring.Request{
				Key: fmt.Sprintf("/decuwatch/eval\n%d-%d", class, seed), Class: class, Priority: scoring.Background,
				Seed: uint64(seed), //nolint:gosec // from 0
			}
			for i := range t.profiles {
				group.Go(func() error { return t.score(ctx, engine, r, i, cell, seed) })
			}
			if t.withError() {
				group.Go(func() error { return t.measureError(ctx, engine, r, cell, seed) })
			}
		}
	}
	return group.Wait()
}

// score scores a request under the profile i.
func (t *trial) score(ctx context.Context, engine *scoring.Engine, r scoring.Request, i, cell, seed int) error {
	r.Profile = t.profiles[i]
	result, err := engine.Score(ctx, r)
	if err != nil {
		return err
	}
	for k, m := range []scoring.Measurement{result.ClassGap, result.RequestRisk} {
		o := t.scores[2*i+k]
		o.values[cell][seed], o.distances[cell][seed] = m.Value, m.MeanDistance
		if m.Saturated {
			o.saturated[cell][seed] = 1
		}
	}
	t.done()
	return nil
}

// measureError measures the error of a request's image.
func (t *trial) measureError(ctx context.Context, engine *scoring.Engine, r scoring.Request, cell, seed int) error {
	r.Profile = t.truth
	rollout, err := engine.Rollout(ctx, r, ensemble.TablesMembers, ensemble.TablesReference)
	if err != nil {
		return err
	}
	members, reference := rollout.Latents[ensemble.TablesMembers], rollout.Latents[ensemble.TablesReference][0]
	for _, latent := range members {
		t.errors[cell][seed] += squaredDistance(latent, reference) / float64(len(members))
	}
	t.done()
	return nil
}

// judge computes both levels of every score.
func (t *trial) judge() {
	r := t.results
	r.Bins = Bins(t.cells)
	requests := func(values [][]float64) *RequestLevel {
		if !t.withError() {
			return nil
		}
		level := JudgeRequests(t.cells, values, t.errors)
		return &level
	}
	for i, o := range t.scores {
		score := &r.Scores[i]
		score.ClassLevel, score.RequestLevel = JudgeClasses(t.cells, o.values), requests(o.values)
		score.Saturated = stat.Mean(slices.Concat(o.saturated...), nil)
		score.MeanDistance = Control{JudgeClasses(t.cells, o.distances), requests(o.distances)}
	}
	control := matrix(len(t.cells), r.Seeds)
	generator := rand.New(rand.NewPCG(1, 1)) //nolint:gosec // a control, not a secret
	for _, cell := range control {
		for i := range cell {
			cell[i] = generator.Float64()
		}
	}
	r.Random = JudgeClasses(t.cells, control)
	if t.withError() {
		r.Error = &Error{t.truth.RequestRisk.Steps, t.truth.GuidanceScale, JudgeClasses(t.cells, t.errors).Means}
	}
}

func matrix(rows, columns int) [][]float64 {
	m := make([][]float64, rows)
	for i := range m {
		m[i] = make([]float64, columns)
	}
	return m
}

func meanOf(values []int) float64 {
	sum := 0
	for _, v := range values {
		sum += v
	}
	return float64(sum) / float64(max(1, len(values)))
}

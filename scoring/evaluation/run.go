package evaluation

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Config says what is evaluated.
type Config struct {
	// Ensembles are evaluated one after another and reported side by side. Each is one manifest, or a directory: its
	// manifests of one backbone are rotations, the same classes with other numbers of training images.
	Ensembles  []string
	Options    scoring.Options // of each engine
	Profiles   []string        // see ParseProfile. Defaults to the manifest's profile
	Truths     []string        // directories of judges that say which images are wrong: judge.json and judge.onnx
	Seeds      int             // requests of each class in each rotation, at least 2
	AlarmSeeds int             // further requests that are only scored, for false alarms; at least 2
	ErrorSteps int             // steps of the images whose errors are compared with scores
	Alpha      float64         // false-alarm rate at which thresholds are calibrated
}

// Evaluation is a checked Config.
type Evaluation struct {
	config   Config
	subjects []*subject
}

// seed returns the seed of a cell's request. All cells have the same seeds, so that they compare the same first
// latents. Only the requests for false alarms have seeds of their own: alarms are counted as if they were independent.
func (c Config) seed(cell, request int) uint64 {
	if request >= c.Seeds {
		request += cell * c.AlarmSeeds
	}
	return uint64(request) //nolint:gosec // not negative
}

// subject is an ensemble that is evaluated.
type subject struct {
	path      string
	manifests []string
	first     *ensemble.Ensemble // of the first manifest
	profiles  []scoring.Profile
	images    scoring.Profile // of the images whose errors are compared with scores
	truths    []truth
}

// New checks the configuration and opens the first manifest of each ensemble. The error is a settings.Error if the
// configuration is wrong.
func New(c Config) (*Evaluation, error) {
	switch {
	case c.Seeds < 2:
		return nil, settings.Errorf("seeds is %d, must be at least 2", c.Seeds)
	case c.AlarmSeeds < 2:
		return nil, settings.Errorf("alarm-seeds is %d, must be at least 2", c.AlarmSeeds)
	case !(c.Alpha > 0 && c.Alpha < 1):
		return nil, settings.Errorf("alpha is %g, must lie between 0 and 1", c.Alpha)
	}
	e := &Evaluation{config: c}
	for _, path := range c.Ensembles {
		s, err := newSubject(path, c)
		if err != nil {
			return nil, err
		}
		e.subjects = append(e.subjects, s)
	}
	return e, nil
}

func newSubject(path string, c Config) (*subject, error) {
	manifests, err := rotations(path)
	if err != nil {
		return nil, err
	}
	first, err := ensemble.Open(manifests[0])
	if err != nil {
		return nil, err
	}
	s := &subject{path: path, manifests: manifests, first: first}
	for _, text := range c.Profiles {
		p, err := ParseProfile(text, &first.Manifest)
		if err != nil {
			return nil, settings.Errorf("profile %q: %w", text, err)
		}
		s.profiles = append(s.profiles, p)
	}
	if len(s.profiles) == 0 {
		s.profiles = []scoring.Profile{first.Profile}
	}
	s.images = first.Profile.WithSampler(first.Diffusion, c.ErrorSteps, first.Profile.GuidanceScale, 0)
	if err := s.images.Validate(&first.Manifest); err != nil {
		return nil, settings.Errorf("error-steps: %w", err)
	}
	for _, dir := range c.Truths {
		judge, err := openTruth(dir, first)
		if err != nil {
			return nil, err
		}
		s.truths = append(s.truths, judge)
	}
	return s, nil
}

// withReference reports whether the error of an image is known.
func (s *subject) withReference() bool { return count(s.first, ensemble.TablesReference) > 0 }

// producers returns how many tables stand in for the production model in evaluations.
func (s *subject) producers() int { return count(s.first, ensemble.TablesProducers) }

// rollouts returns the sets of tables whose images are made, for their errors or for a truth.
func (s *subject) rollouts() (sets []string) {
	if s.withReference() {
		sets = append(sets, ensemble.TablesMembers, ensemble.TablesReference)
	}
	if s.producers() > 0 {
		sets = append(sets, ensemble.TablesProducers)
	}
	return sets
}

// count returns how many tables of a set an ensemble has.
func count(e *ensemble.Ensemble, set string) int {
	if t := e.Tables(set); t != nil {
		return t.Count()
	}
	return 0
}

// Requests returns how many requests Run makes.
func (e *Evaluation) Requests() int {
	n := 0
	for _, s := range e.subjects {
		each := len(s.profiles) * e.config.scored()
		if len(s.rollouts()) > 0 {
			each += e.config.Seeds
		}
		n += each * len(s.manifests) * len(s.first.Classes)
	}
	return n
}

// scored returns how many requests of each class are scored.
func (c Config) scored() int { return c.Seeds + c.AlarmSeeds }

// observed are the numbers of one measurement of one profile, [cells][seeds]. Values are NaN if it was not measured.
type observed struct {
	profile                      int
	name                         schema.MeasurementName
	measure                      scoring.Measure
	values, distances, saturated [][]float64
	firsts                       [][][]float64 // mean distance of the first 2, 3, ... members; of request_risk
}

// trim leaves out what was scored for false alarms alone.
func (o *observed) trim(seeds int) {
	for _, numbers := range append([][][]float64{o.values, o.distances, o.saturated}, o.firsts...) {
		for i := range numbers {
			numbers[i] = numbers[i][:seeds]
		}
	}
}

// trial is the evaluation of one ensemble in progress.
type trial struct {
	*subject
	config Config
	done   func()

	results *Ensemble
	engine  *scoring.Engine  // of the rotation in progress
	eyes    []*scoring.Judge // of the truths, likewise
	cells   []Cell
	classes []ensemble.Class // by cell
	scores  []*observed      // of each profile, its measurements
	members [][]float64      // errors, the mean of the members; [cells][seeds]. Nil without a reference table
	errors  [][][]float64    // of the first two producers, [producers][cells][seeds]
	own     [][]float64      // 1 - p of the ensemble's judge on the first producer's image
	wrong   [][][]bool       // is the first producer's image wrong, by each truth? [truths][cells][seeds]
	alarms  []FalseAlarms    // by score
}

// Run runs every request under every profile, ensemble by ensemble, and judges the scores. It calls done after each
// request, from several goroutines.
func (e *Evaluation) Run(ctx context.Context, done func()) (*Results, error) {
	results := &Results{Seeds: e.config.Seeds}
	for _, s := range e.subjects {
		t := newTrial(s, e, done)
		for i, path := range s.manifests {
			if err := t.rotation(ctx, i, path); err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
		}
		for _, o := range t.scores {
			o.trim(e.config.Seeds)
		}
		t.judge()
		results.Ensembles = append(results.Ensembles, *t.results)
	}
	if len(results.Ensembles) > 1 {
		results.SideBySide = sideBySide(results.Ensembles)
	}
	return results, nil
}

func newTrial(s *subject, e *Evaluation, done func()) *trial {
	n := len(s.manifests) * len(s.first.Classes)
	t := &trial{subject: s, config: e.config, done: done}
	t.results = &Ensemble{
		Path: s.path, Name: s.first.Name, Regime: s.first.Regime, Classes: len(s.first.Classes),
		Requests: n * e.config.Seeds,
	}
	if s.withReference() {
		t.members = matrix(n, e.config.Seeds)
		for range min(s.producers(), 2) {
			t.errors = append(t.errors, matrix(n, e.config.Seeds))
		}
	}
	if s.producers() > 0 {
		t.own = matrix(n, e.config.Seeds)
		for range s.truths {
			wrong := make([][]bool, n)
			for i := range wrong {
				wrong[i] = make([]bool, e.config.Seeds)
			}
			t.wrong = append(t.wrong, wrong)
		}
	}
	for i, p := range s.profiles {
		t.results.Profiles = append(t.results.Profiles, Profile{Settings: p.Settings()})
		for _, m := range measures(p) {
			scored := e.config.scored()
			o := &observed{
				profile: i, name: m.name, measure: m.measure,
				values: matrix(n, scored), distances: matrix(n, scored), saturated: matrix(n, scored),
			}
			if m.name == schema.RequestRisk {
				for range count(s.first, m.measure.Tables) - 1 {
					o.firsts = append(o.firsts, matrix(n, scored))
				}
			}
			t.scores = append(t.scores, o)
			t.alarms = append(t.alarms, newFalseAlarms(m.name, e.config.Alpha, s.first.Labels()))
		}
	}
	return t
}

type namedMeasure struct {
	name    schema.MeasurementName
	measure scoring.Measure
}

// measures returns the measurements of a profile.
func measures(p scoring.Profile) []namedMeasure {
	all := []namedMeasure{{schema.ClassGap, p.ClassGap}, {schema.RequestRisk, p.RequestRisk}}
	if p.ImageRisk != (scoring.Measure{}) {
		all = append(all, namedMeasure{schema.ImageRisk, p.ImageRisk})
	}
	return all
}

// measured returns a measurement of a result, or nil.
func measured(r scoring.Result, name schema.MeasurementName) *scoring.Measurement {
	switch name {
	case schema.ClassGap:
		return &r.ClassGap
	case schema.RequestRisk:
		return r.RequestRisk
	default:
		return r.ImageRisk
	}
}

// rows returns the rows of U-Net work of a measurement by a number of tables.
func rows(p scoring.Profile, m scoring.Measure, tables int) int {
	each := m.BranchStep + m.RolloutSteps*tables // one table carries the latent to the branch
	switch {
	case p.GuidanceScale == 1:
		return each
	case m.Guidance == ensemble.GuidanceShared:
		return each + m.RolloutSteps
	}
	return 2 * each
}

// rotation runs the requests of one manifest, and counts its false alarms.
func (t *trial) rotation(ctx context.Context, rotation int, path string) (err error) {
	if t.engine, err = scoring.Open(path, t.config.Options); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.engine.Close()) }()
	e := t.engine.Ensemble()
	if !slices.Equal(e.Labels(), t.first.Labels()) {
		return fmt.Errorf("%s has other classes than %s", path, t.manifests[0])
	}
	for _, name := range []string{ensemble.TablesMembers, ensemble.TablesPosterior, ensemble.TablesProducer,
		ensemble.TablesProducers, ensemble.TablesReference} {
		if count(e, name) != count(t.first, name) {
			return fmt.Errorf("%s has %d tables %q, %s has %d", path, count(e, name), name, t.manifests[0],
				count(t.first, name))
		}
	}
	defer func() { err = errors.Join(err, t.closeEyes()) }()
	if err := t.openEyes(e); err != nil {
		return err
	}
	t.results.Manifests = append(t.results.Manifests, Manifest{filepath.Base(path), e.Digest})
	for i, p := range t.profiles {
		for class := range e.Classes { // a class that the judge cannot tell costs less
			rows := t.engine.Rows(scoring.Request{Profile: p, Class: class})
			t.results.Profiles[i].Rows = max(t.results.Profiles[i].Rows, rows)
		}
	}
	from := len(t.cells)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(64) // requests in flight fill the runs
	for class := range e.Classes {
		cell := len(t.cells)
		t.cells = append(t.cells, Cell{Rotation: rotation, Class: class, Bin: meanOf(e.Classes[class].Images)})
		t.classes = append(t.classes, e.Classes[class])
		for seed := range t.config.scored() {
			r := scoring.Request{
				Key: fmt.Sprintf("/decuwatch/eval\n%d-%d", class, seed), Class: class, Priority: scoring.Background,
				Seed: t.config.seed(cell, seed),
			}
			for i := range t.profiles {
				group.Go(func() error { return t.score(ctx, r, i, cell, seed) })
			}
			if seed < t.config.Seeds && len(t.rollouts()) > 0 {
				group.Go(func() error { return t.produce(ctx, r, cell, seed) })
			}
		}
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return t.countAlarms(e, from)
}

// openEyes loads the judges of the truths.
func (t *trial) openEyes(e *ensemble.Ensemble) error {
	for _, truth := range t.truths {
		if err := truth.independent(e); err != nil {
			return err
		}
		eye, err := scoring.OpenJudge(truth.Judge, truth.graph, &e.Manifest, t.config.Options)
		if err != nil {
			return fmt.Errorf("truth %s: %w", truth.dir, err)
		}
		t.eyes = append(t.eyes, eye)
	}
	return nil
}

func (t *trial) closeEyes() error {
	var errs []error
	for _, eye := range t.eyes {
		errs = append(errs, eye.Close())
	}
	t.eyes = nil
	return errors.Join(errs...)
}

// score scores a request under the profile i.
func (t *trial) score(ctx context.Context, r scoring.Request, i, cell, seed int) error {
	r.Profile = t.profiles[i]
	result, err := t.engine.Score(ctx, r)
	if err != nil {
		return err
	}
	for _, o := range t.scores {
		if o.profile != i {
			continue
		}
		m := measured(result, o.name)
		if m == nil {
			o.values[cell][seed] = math.NaN()
			continue
		}
		o.values[cell][seed], o.distances[cell][seed] = m.Value, m.MeanDistance
		if m.Saturated {
			o.saturated[cell][seed] = 1
		}
		for k, first := range o.firsts {
			first[cell][seed] = meanDistance(m.Distances, k+2)
		}
	}
	t.done()
	return nil
}

// meanDistance returns the mean distance of the pairs of the first m tables.
func meanDistance(distances [][]float64, m int) float64 {
	sum := 0.0
	for i := range m {
		for k := range m {
			sum += distances[i][k] // zero on the diagonal
		}
	}
	return sum / float64(m*(m-1))
}

// produce measures the errors of a request's images, and whether the first producer's image is wrong.
func (t *trial) produce(ctx context.Context, r scoring.Request, cell, seed int) error {
	r.Profile = t.images
	rollout, err := t.engine.Rollout(ctx, r, t.rollouts()...)
	if err != nil {
		return err
	}
	producers := rollout.Latents[ensemble.TablesProducers]
	if t.members != nil {
		reference, members := rollout.Latents[ensemble.TablesReference][0], rollout.Latents[ensemble.TablesMembers]
		for _, latent := range members {
			t.members[cell][seed] += squaredDistance(latent, reference) / float64(len(members))
		}
		for i := range t.errors {
			t.errors[i][cell][seed] = squaredDistance(producers[i], reference)
		}
	}
	if len(t.wrong) > 0 {
		if err := t.look(ctx, r.Class, producers[0], cell, seed); err != nil {
			return err
		}
	}
	t.done()
	return nil
}

// look lets all judges see the image of the first producer.
func (t *trial) look(ctx context.Context, class int, latent []float32, cell, seed int) error {
	pictures, err := t.engine.Pictures(ctx, [][]float32{latent})
	if err != nil {
		return err
	}
	t.own[cell][seed] = math.NaN()
	if p := pictures[0].Probabilities; p != nil {
		t.own[cell][seed] = 1 - p[class]
	}
	for i, eye := range t.eyes {
		p, err := eye.Probabilities([][]float32{pictures[0].Image})
		if err != nil {
			return err
		}
		t.wrong[i][cell][seed] = mostLikely(p[0]) != class
	}
	return nil
}

// countAlarms counts the false alarms of a rotation, whose cells begin at from.
func (t *trial) countAlarms(e *ensemble.Ensemble, from int) error {
	for i, o := range t.scores {
		var halves [2][]schema.Sample
		for cell := from; cell < len(t.cells); cell++ {
			for seed := t.config.Seeds; seed < t.config.scored(); seed++ {
				v := o.values[cell][seed]
				if math.IsNaN(v) {
					continue
				}
				half := &halves[0]
				if seed >= t.config.Seeds+t.config.AlarmSeeds/2 {
					half = &halves[1]
				}
				*half = append(*half, schema.Sample{Class: t.cells[cell].Class, Value: v, Distance: o.distances[cell][seed],
					Saturated: o.saturated[cell][seed] == 1})
			}
		}
		err := t.alarms[i].count(e, t.profiles[o.profile].Settings(), halves[0], halves[1])
		if err != nil {
			return err
		}
	}
	return nil
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

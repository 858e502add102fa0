package ensemble

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
)

// Estimators of a measurement. The first three are PaiDE in nats, at most ln M, over the named distance between the
// tables' predictive distributions.
const (
	PaiDEW2            = "paide-w2"            // squared 2-Wasserstein distance
	PaiDEKL            = "paide-kl"            // Kullback-Leibler divergence
	PaiDEBhattacharyya = "paide-bhattacharyya" // Bhattacharyya distance
	MeanW2             = "mean-w2"             // the mean pairwise squared 2-Wasserstein distance itself: unbounded
	PixelPaiDEW2       = "pixel-paide-w2"      // PaiDE of every latent position, averaged over the positions
	EstimatorJudge     = "judge"               // 1 - the judge's probability of the class; of image_risk alone
)

// Sets of tables, by the names that measurements give them.
const (
	TablesMembers   = "members"   // the M components
	TablesPosterior = "posterior" // P tables drawn around the producer's
	TablesProducer  = "producer"  // the one table that stands for the production model
)

// Guidance modes: where the unconditional prediction of classifier-free guidance comes from.
const (
	GuidanceOwn    = "own"    // each table's unconditional row, at its own latent
	GuidanceShared = "shared" // one row for all tables, at their mean latent
)

// Measure says which tables a measurement runs, with how many steps and which guidance, at which step they leave the
// shared path, how many steps they take, and how their distance is estimated. Manifests of format 1 leave out tables,
// steps and guidance.
type Measure struct {
	Tables       string `json:"tables" format:"2"`
	Steps        int    `json:"steps" format:"2"` // S, as a sampler is asked for them: Diffusion.StepCount are taken
	Guidance     string `json:"guidance" format:"2"`
	BranchStep   int    `json:"branch_step"`   // b: the carrying table does the steps before it
	RolloutSteps int    `json:"rollout_steps"` // r: steps that each table takes on its own path
	Estimator    string `json:"estimator"`
}

// Profile is the sampler and the measurements of a score. The zero value stands for "not given".
type Profile struct {
	// Sampler is the name of the sampler, diffusion.KindFlowMatch, or "" for DDIM. It follows from the ensemble.
	Sampler       string  `json:"-"`
	GuidanceScale float64 `json:"guidance_scale"` // at exactly 1 the unconditional rows are not computed
	Eta           float64 `json:"eta"`
	ClassGap      Measure `json:"class_gap"`
	RequestRisk   Measure `json:"request_risk"`
	ImageRisk     Measure `json:"image_risk,omitzero" format:"2"` // zero: not measured
	Cascade       Cascade `json:"cascade,omitzero" format:"2"`    // zero: the request risk is always measured
	Reason        string  `json:"reason"`

	// Start is the step at which the request's latent stands: 0 for a first latent, which a manifest means.
	Start int `json:"-"`
}

// Cascade spares the request risk of requests whose class gap is low. It says what is measured, not how, so it is no
// part of the settings.
type Cascade struct {
	// Cut is the class gap, in the unit of its estimator, below which the request risk is not measured.
	Cut float64 `json:"cut"`
	// Share of the requests below the cut, 0 to 1, whose request risk is measured all the same. Without it nothing is
	// known of their request risk.
	Share float64 `json:"share"`
}

// Validate returns an error that names the field that is out of its bounds.
func (c Cascade) Validate() error {
	switch {
	case c == Cascade{}:
		return nil
	case !(c.Cut > 0) || math.IsInf(c.Cut, 0):
		return fmt.Errorf("cut is %v, must be positive", c.Cut)
	case !(c.Share >= 0 && c.Share <= 1):
		return fmt.Errorf("share is %v, must be 0 to 1", c.Share)
	}
	return nil
}

// Bare returns the profile without what does not change how it measures.
func (p Profile) Bare() Profile {
	p.Reason, p.Cascade = "", Cascade{}
	return p
}

// Of returns the profile of an ensemble with the given diffusion.
func (p Profile) Of(d Diffusion) Profile {
	if p.Sampler = d.Sampler(); p.Sampler == diffusion.KindDDIM {
		p.Sampler = ""
	}
	return p
}

// Settings returns the canonical key of the sampler and of all measurements. Scores are comparable, and a threshold
// applies, only if it is equal. Examples:
//
//	ddim s=20 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@10+1
//	ddim g=2 eta=0 class_gap=paide-w2@0+1/3:posterior:shared request_risk=mean-w2@0+2/3:members:shared
//
// 10+1/20 stands for branch step 10, one roll-out step and 20 steps. The first form is for a profile that format 1 can
// express: two measurements of the members with one number of steps and each member's own guidance.
func (p Profile) Settings() string {
	number := func(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
	gap, risk := p.ClassGap, p.RequestRisk
	sampler := cmp.Or(p.Sampler, diffusion.KindDDIM)
	if plain := plainMeasure(gap.Steps); plain(gap) && plain(risk) && p.ImageRisk == (Measure{}) {
		return fmt.Sprintf("%s%s s=%d g=%s eta=%s class_gap=%s request_risk=%s",
			sampler, p.start(), gap.Steps, number(p.GuidanceScale), number(p.Eta), gap.place(), risk.place())
	}
	key := fmt.Sprintf("%s%s g=%s eta=%s class_gap=%s request_risk=%s",
		sampler, p.start(), number(p.GuidanceScale), number(p.Eta), gap, risk)
	if p.ImageRisk != (Measure{}) {
		key += " image_risk=" + p.ImageRisk.String()
	}
	return key
}

// settingsForms are the two forms of Settings.
var settingsForms = []*regexp.Regexp{
	regexp.MustCompile(`^(?:ddim|flow_match)(?: start=(\d+))? s=(\S+) g=(\S+) eta=(\S+) ` +
		`class_gap=(\S+) request_risk=(\S+)$`),
	regexp.MustCompile(`^(?:ddim|flow_match)(?: start=(\d+))? g=(\S+) eta=(\S+) ` +
		`class_gap=(\S+) request_risk=(\S+?)(?: image_risk=(\S+))?$`),
}

// measureForm is String, or the part of it that the first form of Settings has.
var measureForm = regexp.MustCompile(`^([a-z0-9-]+)@(\d+)\+(\d+)(?:/(\d+):([a-z]+):([a-z]+))?$`)

// ParseSettings returns the profile whose Settings are given.
func ParseSettings(key string) (Profile, error) {
	var p Profile
	var err error
	number := func(s string) float64 {
		v, e := strconv.ParseFloat(s, 64)
		err = errors.Join(err, e)
		return v
	}
	measure := func(s string) Measure {
		m, e := parseMeasure(s)
		err = errors.Join(err, e)
		return m
	}
	start := ""
	if f := settingsForms[0].FindStringSubmatch(key); f != nil {
		start = f[1]
		p = Profile{GuidanceScale: number(f[3]), Eta: number(f[4]), ClassGap: measure(f[5]), RequestRisk: measure(f[6])}
		for _, m := range []*Measure{&p.ClassGap, &p.RequestRisk} {
			m.Steps, m.Tables, m.Guidance = int(number(f[2])), TablesMembers, GuidanceOwn
		}
	} else if f := settingsForms[1].FindStringSubmatch(key); f != nil {
		start = f[1]
		p = Profile{GuidanceScale: number(f[2]), Eta: number(f[3]), ClassGap: measure(f[4]), RequestRisk: measure(f[5])}
		if f[6] != "" {
			p.ImageRisk = measure(f[6])
		}
	}
	if start != "" {
		p.Start = int(number(start))
	}
	if sampler, _, _ := strings.Cut(key, " "); sampler != diffusion.KindDDIM {
		p.Sampler = sampler
	}
	if err == nil && p.Settings() != key {
		err = errors.New("they are in no known form")
	}
	if err != nil {
		return Profile{}, fmt.Errorf("settings %q: %w", key, err)
	}
	return p, nil
}

func parseMeasure(s string) (m Measure, err error) {
	f := measureForm.FindStringSubmatch(s)
	if f == nil {
		return m, fmt.Errorf("%q is no measurement", s)
	}
	m = Measure{Estimator: f[1], Tables: f[5], Guidance: f[6]}
	for i, number := range map[int]*int{2: &m.BranchStep, 3: &m.RolloutSteps, 4: &m.Steps} {
		if f[i] != "" && err == nil {
			*number, err = strconv.Atoi(f[i])
		}
	}
	return m, err
}

// start names the step at which the latent stands, if it is not a first latent.
func (p Profile) start() string {
	if p.Start == 0 {
		return ""
	}
	return fmt.Sprintf(" start=%d", p.Start)
}

// From returns the profile of a request whose latent stands at a step of the sampler: every measurement begins there,
// or branches later.
func (p Profile) From(d Diffusion, step int) Profile {
	p.Start = step
	for _, m := range []*Measure{&p.ClassGap, &p.RequestRisk, &p.ImageRisk} {
		if *m == (Measure{}) {
			continue
		}
		m.BranchStep = max(m.BranchStep, step)
		m.RolloutSteps = max(1, min(m.RolloutSteps, d.StepCount(m.Steps)-m.BranchStep))
	}
	return p
}

// plainMeasure returns whether format 1 can express a measurement, in a profile of the given steps.
func plainMeasure(steps int) func(Measure) bool {
	return func(m Measure) bool {
		return m.Steps == steps && m.Tables == TablesMembers && m.Guidance == GuidanceOwn
	}
}

// String returns estimator@branch+rollout/steps:tables:guidance.
func (m Measure) String() string {
	return fmt.Sprintf("%s/%d:%s:%s", m.place(), m.Steps, m.Tables, m.Guidance)
}

func (m Measure) place() string {
	return fmt.Sprintf("%s@%d+%d", m.Estimator, m.BranchStep, m.RolloutSteps)
}

// WithSampler returns the profile with another sampler, whose steps every measurement gets. A branch step keeps its
// relative place (rounded to the nearest step), a roll-out to the end stays one, a single step stays single, any other
// keeps its share of the steps. The ensemble's diffusion says how many steps both samplers take.
func (p Profile) WithSampler(d Diffusion, steps int, guidanceScale, eta float64) Profile {
	p.GuidanceScale, p.Eta = guidanceScale, eta
	p.ClassGap, p.RequestRisk = p.ClassGap.withSteps(d, steps), p.RequestRisk.withSteps(d, steps)
	if p.ImageRisk != (Measure{}) {
		p.ImageRisk = p.ImageRisk.withSteps(d, steps)
	}
	return p
}

func (m Measure) withSteps(d Diffusion, steps int) Measure {
	from, to := d.StepCount(m.Steps), d.StepCount(steps)
	m.Steps = steps
	if from < 1 || to < 1 {
		return m
	}
	ratio := float64(to) / float64(from)
	branch := min(int(math.Round(float64(m.BranchStep)*ratio)), to-1)
	rollout := max(1, int(math.Round(float64(m.RolloutSteps)*ratio)))
	switch m.RolloutSteps {
	case 1:
		rollout = 1
	case from - m.BranchStep:
		rollout = to - branch
	}
	m.BranchStep, m.RolloutSteps = branch, min(rollout, to-branch)
	return m
}

// Validate returns an error that names the field that is out of its bounds, or that the ensemble of the manifest cannot
// follow.
func (p Profile) Validate(m *Manifest) error {
	switch {
	case !(p.GuidanceScale >= 0 && p.GuidanceScale <= 30):
		return fmt.Errorf("guidance_scale is %v, must be 0 to 30", p.GuidanceScale)
	case !(p.Eta >= 0 && p.Eta <= 1):
		return fmt.Errorf("eta is %v, must be 0 to 1", p.Eta)
	}
	if err := p.ClassGap.validateDistance(m, p); err != nil {
		return fmt.Errorf("class_gap.%w", err)
	}
	if err := p.RequestRisk.validateDistance(m, p); err != nil {
		return fmt.Errorf("request_risk.%w", err)
	}
	if err := p.Cascade.Validate(); err != nil {
		return fmt.Errorf("cascade.%w", err)
	}
	if p.ImageRisk == (Measure{}) {
		return nil
	}
	if err := p.ImageRisk.validateJudge(m, p); err != nil {
		return fmt.Errorf("image_risk.%w", err)
	}
	return nil
}

// validateDistance checks a measurement of distances between tables.
func (m Measure) validateDistance(e *Manifest, p Profile) error {
	if err := oneOf("tables", m.Tables, TablesMembers, TablesPosterior); err != nil {
		return err
	}
	if m.Tables == TablesPosterior && e.Posterior == 0 {
		return fmt.Errorf("tables is %q, the ensemble has no such tables", m.Tables)
	}
	if err := oneOf("guidance", m.Guidance, GuidanceOwn, GuidanceShared); err != nil {
		return err
	}
	if err := m.validateSteps(e.Diffusion, p); err != nil {
		return err
	}
	if m.Guidance == GuidanceShared && m.BranchStep != p.Start {
		return fmt.Errorf("branch_step is %d, must be %d with shared guidance", m.BranchStep, p.Start)
	}
	return oneOf("estimator", m.Estimator, PaiDEW2, PaiDEKL, PaiDEBhattacharyya, MeanW2, PixelPaiDEW2)
}

// validateJudge checks the measurement of the producer's image.
func (m Measure) validateJudge(e *Manifest, p Profile) error {
	if err := oneOf("tables", m.Tables, TablesProducer); err != nil {
		return err
	}
	if err := oneOf("guidance", m.Guidance, GuidanceOwn); err != nil {
		return err
	}
	if err := m.validateSteps(e.Diffusion, p); err != nil {
		return err
	}
	if m.BranchStep != p.Start {
		return fmt.Errorf("branch_step is %d, must be %d", m.BranchStep, p.Start)
	}
	if err := oneOf("estimator", m.Estimator, EstimatorJudge); err != nil {
		return err
	}
	if e.Judge == nil {
		return fmt.Errorf("estimator is %q, the ensemble has no judge", m.Estimator)
	}
	return nil
}

// validateSteps checks that a sampler of the diffusion takes the steps of a measurement.
func (m Measure) validateSteps(d Diffusion, p Profile) error {
	taken, err := stepsTaken(d, m.Steps, p.Eta)
	switch {
	case err != nil:
		return err
	case p.Start < 0 || p.Start >= taken:
		return fmt.Errorf("start is %d, must be 0 to %d", p.Start, taken-1)
	case m.BranchStep < p.Start || m.BranchStep >= taken:
		return fmt.Errorf("branch_step is %d, must be %d to %d", m.BranchStep, p.Start, taken-1)
	case m.RolloutSteps < 1 || m.RolloutSteps > taken-m.BranchStep:
		return fmt.Errorf("rollout_steps is %d, must be 1 to %d", m.RolloutSteps, taken-m.BranchStep)
	}
	return nil
}

// stepsTaken returns how many steps a sampler takes that is asked for steps. The error names what is out of bounds.
func stepsTaken(d Diffusion, steps int, eta float64) (int, error) {
	if steps < 1 || steps > 1000 {
		return 0, fmt.Errorf("steps is %d, must be 1 to 1000", steps)
	}
	taken, err := diffusion.Steps(d, steps, eta)
	return len(taken), err
}

package evaluation

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/stat"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Results is what an evaluation found.
type Results struct {
	Seeds      int        `json:"seeds"` // requests of each class in each rotation
	Ensembles  []Ensemble `json:"ensembles"`
	SideBySide []Figure   `json:"side_by_side,omitempty"` // of several ensembles
}

// Ensemble is what was found of one ensemble.
type Ensemble struct {
	Path      string     `json:"path"`
	Name      string     `json:"ensemble"`
	Regime    string     `json:"regime"`
	Manifests []Manifest `json:"manifests"`
	Classes   int        `json:"classes"`
	Requests  int        `json:"requests"` // of each score
	Bins      []float64  `json:"bins"`     // training images
	Profiles  []Profile  `json:"profiles"`
	Scores    []Score    `json:"scores"`
	// Controls are scores of no rows: random, count (images of the class), n_eff (of the data card), closed_form (the
	// manifest's expected class gap). The last two are there if the manifests have them.
	Controls []Control `json:"controls"`
	// Ceiling is the request level of the error of the second producer's image; null without a second producer.
	Ceiling *RequestLevel `json:"ceiling"`
	Error   *Error        `json:"error"` // null if the ensemble carries no reference table
	Truths  []Seen        `json:"truths"`
	Alarms  []FalseAlarms `json:"false_alarms"` // in the order of Scores
}

// Manifest is one rotation.
type Manifest struct {
	File   string `json:"file"`
	Digest string `json:"digest"`
}

// Profile is one profile that was evaluated.
type Profile struct {
	Settings string `json:"settings"`
	Rows     int    `json:"rows"` // of U-Net work of a score with all its measurements
}

// Error describes the errors of the requests: squared distances of the final latent to the final latent under the
// backbone's own fully trained table.
type Error struct {
	Steps    int       `json:"steps"`
	Guidance float64   `json:"guidance_scale"`
	Producer []BinMean `json:"producer_mean_by_bin"` // of the first producer; null without producers
	Members  []BinMean `json:"members_mean_by_bin"`  // averaged over the members
}

// Levels is how good a score is.
type Levels struct {
	ClassLevel ClassLevel `json:"class_level"`
	// RequestLevel compares scores with the error of the first producer's image. Null without producers.
	RequestLevel *RequestLevel `json:"request_level"`
	// MembersLevel compares scores with the mean error of the members' images, as earlier versions did. It flatters
	// scores that the same members give: part of it is the correlation of a part with its whole.
	MembersLevel *RequestLevel `json:"request_level_of_own_members"`
	// ImageLevels compares scores with wrong images of the first producer, by each truth judge.
	ImageLevels []ImageLevel `json:"image_level"`
}

// Score is one measurement of one profile.
type Score struct {
	Profile     int                    `json:"profile"` // index
	Measurement schema.MeasurementName `json:"measurement"`
	Settings    string                 `json:"settings"`  // of the measurement
	Rows        int                    `json:"rows"`      // of U-Net work, of this measurement alone
	Saturated   float64                `json:"saturated"` // share of scores at their upper bound
	Measured    int                    `json:"measured"`  // requests that have the measurement
	Levels
	OfCeiling *float64 `json:"of_ceiling"` // request_level.within over the ceiling's
	// ByMembers are the mean distances of the first 2, 3, ... members. Of request_risk alone.
	ByMembers []MemberCount `json:"by_members,omitempty"`
	// MeanDistance is the control of PaiDE: the plain mean of the same pairwise distances. Null if the score is that.
	MeanDistance *Levels `json:"mean_distance"`
}

// MemberCount is the request level by a number of members.
type MemberCount struct {
	Members      int           `json:"members"`
	Rows         int           `json:"rows"`
	RequestLevel *RequestLevel `json:"request_level"`
	MembersLevel *RequestLevel `json:"request_level_of_own_members"`
}

// Control is a score that costs no rows.
type Control struct {
	Name string `json:"name"`
	Levels
}

// Seen is what a truth judge saw in the images of the first producer.
type Seen struct {
	Judge    string    `json:"judge"`  // its directory
	Digest   string    `json:"digest"` // SHA-256 of judge.onnx
	Measured string    `json:"measured"`
	Requests int       `json:"requests"`           // whose class the truth can tell, and that have an image_risk
	Wrong    []BinMean `json:"wrong_share_by_bin"` // share of images that are not of the class asked for
	// Ceiling is the image level of the ensemble's own judge on these very images; null without a judge.
	Ceiling *ImageLevel `json:"ceiling"`
}

// judge computes all levels of every score and control.
func (t *trial) judge() {
	r := t.results
	r.Bins = Bins(t.cells)
	if len(t.errors) > 1 {
		r.Ceiling = new(JudgeRequests(t.cells, t.errors[1], t.errors[0]))
	}
	for i := range t.wrong {
		truth, cells := t.truths[i], t.imageCells(t.truths[i])
		seen := Seen{Judge: truth.dir, Digest: truth.digest, Measured: truth.Measured,
			Requests: len(cells) * t.config.Seeds}
		shares := make([][]float64, len(cells))
		for k, cell := range cells {
			shares[k] = indicators(t.wrong[i][cell])
		}
		seen.Wrong = binMeans(pick(t.cells, cells), shares)
		if len(measuredCells(t.own)) == len(t.own) {
			seen.Ceiling = new(JudgeImages(pick(t.own, cells), pick(t.wrong[i], cells)))
		}
		r.Truths = append(r.Truths, seen)
	}
	for i, o := range t.scores {
		r.Scores = append(r.Scores, t.judgeScore(o))
		r.Alarms = append(r.Alarms, t.alarms[i])
	}
	generator := rand.New(rand.NewPCG(1, 1)) //nolint:gosec // a control, not a secret
	t.control("random", func(int) float64 { return generator.Float64() })
	t.control("count", func(cell int) float64 { return -t.cells[cell].Bin })
	if !slices.ContainsFunc(t.classes, func(c ensemble.Class) bool { return c.Data == nil }) {
		t.control("n_eff", func(cell int) float64 { return -t.classes[cell].Data.NEff })
	}
	if !slices.ContainsFunc(t.classes, func(c ensemble.Class) bool { return c.ClassGap == nil }) {
		t.control("closed_form", func(cell int) float64 { return *t.classes[cell].ClassGap })
	}
	if t.members != nil {
		r.Error = &Error{Steps: t.config.ErrorSteps, Guidance: t.images.GuidanceScale, Members: binMeans(t.cells, t.members)}
		if len(t.errors) > 0 {
			r.Error.Producer = binMeans(t.cells, t.errors[0])
		}
	}
}

// control judges a score that a function gives for a cell.
func (t *trial) control(name string, score func(cell int) float64) {
	values := matrix(len(t.cells), t.config.Seeds)
	for cell := range values {
		for seed := range values[cell] {
			values[cell][seed] = score(cell)
		}
	}
	t.results.Controls = append(t.results.Controls, Control{name, t.levels(values)})
}

func (t *trial) judgeScore(o *observed) Score {
	p := t.profiles[o.profile]
	s := Score{
		Profile: o.profile, Measurement: o.name, Settings: o.measure.String(),
		Rows:      rows(p, o.measure, count(t.first, o.measure.Tables)),
		Saturated: stat.Mean(slices.Concat(o.saturated...), nil),
		Levels:    t.levels(o.values),
	}
	for _, v := range slices.Concat(o.values...) {
		if !math.IsNaN(v) {
			s.Measured++
		}
	}
	if c := t.results.Ceiling; c != nil && c.Within != nil && s.RequestLevel != nil && s.RequestLevel.Within != nil {
		s.OfCeiling = new(s.RequestLevel.Within.Value / c.Within.Value)
	}
	for i, values := range o.firsts {
		level := MemberCount{Members: i + 2, Rows: rows(p, o.measure, i+2)}
		level.RequestLevel, level.MembersLevel = t.requestLevels(values)
		s.ByMembers = append(s.ByMembers, level)
	}
	if o.measure.Estimator != ensemble.MeanW2 && o.measure.Estimator != ensemble.EstimatorJudge {
		s.MeanDistance = new(t.levels(o.distances))
	}
	return s
}

// levels computes the levels of scores [cells][seeds]. Cells whose scores are NaN have not been measured, and are left
// out.
func (t *trial) levels(values [][]float64) Levels {
	cells := measuredCells(values)
	l := Levels{ClassLevel: JudgeClasses(pick(t.cells, cells), pick(values, cells))}
	l.RequestLevel, l.MembersLevel = t.requestLevels(values)
	for i, wrong := range t.wrong {
		cells := t.imageCells(t.truths[i])
		l.ImageLevels = append(l.ImageLevels, JudgeImages(pick(values, cells), pick(wrong, cells)))
	}
	return l
}

// requestLevels compares scores with the error of the first producer, and with the members' mean error.
func (t *trial) requestLevels(values [][]float64) (producer, members *RequestLevel) {
	if t.members == nil {
		return nil, nil
	}
	cells := measuredCells(values)
	level := func(errors [][]float64) *RequestLevel {
		return new(JudgeRequests(pick(t.cells, cells), pick(values, cells), pick(errors, cells)))
	}
	if len(t.errors) > 0 {
		producer = level(t.errors[0])
	}
	return producer, level(t.members)
}

// imageCells returns the cells whose class a truth can tell, and that have every score. So all scores are judged on the
// same images.
func (t *trial) imageCells(truth truth) []int {
	var cells []int
	for i, c := range t.cells {
		all := truth.CanTell(c.Class)
		for _, o := range t.scores {
			all = all && !floats.HasNaN(o.values[i])
		}
		if all {
			cells = append(cells, i)
		}
	}
	return cells
}

func measuredCells(values [][]float64) []int {
	var cells []int
	for i := range values {
		if !floats.HasNaN(values[i]) {
			cells = append(cells, i)
		}
	}
	return cells
}

// pick returns the elements with the given indices.
func pick[T any](all []T, indices []int) []T {
	picked := make([]T, len(indices))
	for i, k := range indices {
		picked[i] = all[k]
	}
	return picked
}

// indicators returns 1 for true and 0 for false.
func indicators(values []bool) []float64 {
	numbers := make([]float64, len(values))
	for i, v := range values {
		if v {
			numbers[i] = 1
		}
	}
	return numbers
}

// Figure is one number of several ensembles.
type Figure struct {
	Name   string     `json:"name"`
	Values []*float64 `json:"values"` // by ensemble; null if it has no such number
	Mean   *float64   `json:"mean"`   // of those that have it
	Spread *float64   `json:"spread"` // largest minus smallest; null unless two have it
}

// sideBySide returns the figures of ensembles, in the order in which they first appear.
func sideBySide(ensembles []Ensemble) []Figure {
	var figures []Figure
	for i := range ensembles {
		ensembles[i].figures(func(name string, value *float64) {
			at := slices.IndexFunc(figures, func(f Figure) bool { return f.Name == name })
			if at < 0 {
				at = len(figures)
				figures = append(figures, Figure{Name: name, Values: make([]*float64, len(ensembles))})
			}
			figures[at].Values[i] = value
		})
	}
	for i := range figures {
		var values []float64
		for _, v := range figures[i].Values {
			if v != nil {
				values = append(values, *v)
			}
		}
		figures[i].Mean = number(stat.Mean(values, nil))
		if len(values) > 1 {
			figures[i].Spread = new(floats.Max(values) - floats.Min(values))
		}
	}
	return figures
}

// figures calls add with each figure that is compared between ensembles.
func (r *Ensemble) figures(add func(name string, value *float64)) {
	within := func(name string, level *RequestLevel) {
		if level != nil && level.Within != nil {
			add(name, &level.Within.Value)
		}
	}
	within("request level, ceiling", r.Ceiling)
	for i, s := range r.Scores {
		name := r.scoreName(s)
		within("request level, "+name, s.RequestLevel)
		if s.OfCeiling != nil {
			add("request level, "+name+", of the ceiling", s.OfCeiling)
		}
		within("request level, "+name+", own members (old)", s.MembersLevel)
		for _, a := range s.ClassLevel.Against {
			add(fmt.Sprintf("class level, %s, AUROC %g v %g", name, a.Bin, s.ClassLevel.largest()), &a.AUROC.Value)
		}
		for k, l := range s.ImageLevels {
			if l.AUROC != nil {
				add(fmt.Sprintf("image level, %s, AUROC by truth %d", name, k+1), &l.AUROC.Value)
			}
			if l.Within != nil {
				add(fmt.Sprintf("image level, %s, within, by truth %d", name, k+1), &l.Within.Value)
			}
		}
		if a := r.Alarms[i].All; a.Scores > 0 {
			add("false alarms, "+name, new(float64(a.Alerts)/float64(a.Scores)))
		}
	}
}

// scoreName returns a score's measurement, with the number of its profile if there are several.
func (r *Ensemble) scoreName(s Score) string {
	if len(r.Profiles) == 1 {
		return string(s.Measurement)
	}
	return fmt.Sprintf("%s (%d)", s.Measurement, s.Profile+1)
}

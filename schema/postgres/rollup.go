package postgres

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/decuwatch/decuwatch/schema"
)

// sums is what is summed of a measurement. Each score stands for 1/p requests, p being its inclusion probability.
type sums struct {
	lot
	n            int // scores that have it
	unmeasured   int // scores that lack it
	sum, squares float64
	min, max     *float64
	saturated    int

	varianceSum, varianceSquares float64 // sums of v x and v x^2, see lot
}

// lot sums what is needed for the number of requests that scores stand for, and its standard error.
type lot struct {
	extra    float64 // of 1/p - 1: requests beside the scores
	variance float64 // of v = (1 - p) / p^2, the variance of that number
}

// draw counts a score and returns its weight 1/p, and v.
func (l *lot) draw(p float64) (weight, v float64) {
	weight, v = 1/p, (1-p)/(p*p)
	l.extra += weight - 1
	l.variance += v
	return weight, v
}

var (
	summed = []column[sums]{
		{"_sum", func(s *sums) any { return &s.sum }},
		{"_squares", func(s *sums) any { return &s.squares }},
		{"_min", func(s *sums) any { return &s.min }},
		{"_max", func(s *sums) any { return &s.max }},
	}
	sampled = []column[sums]{
		{"_extra", func(s *sums) any { return &s.extra }},
		{"_variance", func(s *sums) any { return &s.variance }},
		{"_variance_sum", func(s *sums) any { return &s.varianceSum }},
		{"_variance_squares", func(s *sums) any { return &s.varianceSquares }},
	}
	saturated = []column[sums]{{"_saturated", func(s *sums) any { return &s.saturated }}}
	// counted or lacking is for a measurement that some scores lack.
	counted = []column[sums]{{"_n", func(s *sums) any { return &s.n }}}
	lacking = []column[sums]{{"_unmeasured", func(s *sums) any { return &s.unmeasured }}}
)

// add counts one score, which lacks the measurement if m is nil. P is the probability with which it was to be made.
func (s *sums) add(m *schema.Measurement, p float64) {
	if m == nil {
		s.unmeasured++
		return
	}
	if s.n == 0 {
		s.min, s.max = &m.Value, &m.Value
	}
	least, greatest := min(*s.min, m.Value), max(*s.max, m.Value)
	weight, v := s.draw(p)
	s.n++
	s.sum += weight * m.Value
	s.squares += weight * m.Value * m.Value
	s.varianceSum += v * m.Value
	s.varianceSquares += v * m.Value * m.Value
	s.min, s.max = &least, &greatest
	s.saturated += one(m.Saturated)
}

// classSums is what a row of class_hour_parts or class_day_parts sums.
type classSums struct {
	Model          string `json:"model"`
	EnsembleDigest string `json:"ensemble_digest"`
	Settings       string `json:"settings"`
	ClassIndex     int    `json:"class_index"`
	ClassLabel     string `json:"class_label"`
	N              int    `json:"n"`
	Warnings       int    `json:"warnings"`
	Criticals      int    `json:"criticals"`
	Folded         bool   `json:"folded"`

	Extra             float64 `json:"extra"`
	Variance          float64 `json:"variance"`
	WarningsExtra     float64 `json:"warnings_extra"`
	WarningsVariance  float64 `json:"warnings_variance"`
	CriticalsExtra    float64 `json:"criticals_extra"`
	CriticalsVariance float64 `json:"criticals_variance"`

	measured map[schema.MeasurementName]*sums // in columns of their own, see stored
}

// columns returns the columns that hold sums of measurements.
func (*classSums) columns() []string {
	var names []string
	for _, m := range stored {
		names = append(names, columnNames(m.name, m.sums)...)
	}
	return names
}

// appendTo adds these columns to the JSON of a row.
func (s *classSums) appendTo(row []byte, err error) ([]byte, error) {
	for _, m := range stored {
		if err == nil {
			row, err = appendColumns(row, m.name, m.sums, s.measured[m.name])
		}
	}
	return row, err
}

// classHourRow is a row of class_hour_parts.
type classHourRow struct {
	Hour time.Time `json:"hour"`
	*classSums
}

// MarshalJSON writes the row.
func (r classHourRow) MarshalJSON() ([]byte, error) {
	type plain classHourRow
	return r.appendTo(json.Marshal(plain(r)))
}

// classDayRow is a row of class_day_parts.
type classDayRow struct {
	Day time.Time `json:"day"`
	*classSums
}

// MarshalJSON writes the row.
func (r classDayRow) MarshalJSON() ([]byte, error) {
	type plain classDayRow
	return r.appendTo(json.Marshal(plain(r)))
}

// outcomeHourRow is a row of outcome_hour_parts.
type outcomeHourRow struct {
	Hour    time.Time      `json:"hour,omitzero"` // zero: the hour of the recording
	Model   string         `json:"model"`
	Outcome schema.Outcome `json:"outcome"`
	Reason  string         `json:"reason"`
	N       int            `json:"n"`
}

// classKey is what one row sums over.
type classKey struct {
	time  time.Time
	of    schema.Series
	class int
}

// rollup sums the verdicts of one transaction.
type rollup struct {
	hours, days map[classKey]*classSums
	outcomes    map[outcomeHourRow]int
}

func newRollup() rollup {
	return rollup{map[classKey]*classSums{}, map[classKey]*classSums{}, map[outcomeHourRow]int{}}
}

// add counts the verdict of a call. Canaries count as verdicts only.
func (r rollup) add(c *call) {
	if c.score != nil && !c.canary {
		addClass(r.hours, time.Hour, c.score, c.alerts)
		addClass(r.days, 24*time.Hour, c.score, c.alerts)
	}
	row := outcomeHourRow{Outcome: c.result.Outcome, Reason: c.result.Reason}
	if c.event != nil {
		row.Hour, row.Model = c.event.EventTime.UTC().Truncate(time.Hour), c.event.Model
	}
	if c.deadLetter != nil {
		row.Model = text(c.deadLetter.Model)
	}
	r.outcomes[row]++
}

// insert adds the statements that write the sums.
func (r rollup) insert(b *batch) {
	hours, days := make([]classHourRow, 0, len(r.hours)), make([]classDayRow, 0, len(r.days))
	for key, sums := range r.hours {
		hours = append(hours, classHourRow{key.time, sums})
	}
	for key, sums := range r.days {
		days = append(days, classDayRow{key.time, sums})
	}
	outcomes := make([]outcomeHourRow, 0, len(r.outcomes))
	for row, n := range r.outcomes {
		row.N = n
		outcomes = append(outcomes, row)
	}
	insert(b, "class_hour_parts", "", hours)
	insert(b, "class_day_parts", "", days)
	addRows(b, insertOutcomes, outcomes)
}

func addClass(classes map[classKey]*classSums, span time.Duration, s *scoreRow, alerts []alertRow) {
	of := schema.Series{Model: s.Model, EnsembleDigest: s.EnsembleDigest, Settings: s.Settings}
	key := classKey{s.EventTime.UTC().Truncate(span), of, s.ClassIndex}
	row := classes[key]
	if row == nil {
		row = &classSums{
			Model: s.Model, EnsembleDigest: s.EnsembleDigest, Settings: s.Settings,
			ClassIndex: s.ClassIndex, ClassLabel: s.ClassLabel,
			measured: map[schema.MeasurementName]*sums{},
		}
		for _, m := range stored {
			row.measured[m.name] = &sums{}
		}
		classes[key] = row
	}
	for name, sums := range row.measured {
		sums.add(s.measured[name], s.probability(name))
	}
	count(&row.N, &row.Extra, &row.Variance, s.InclusionProbability)
	has := func(of schema.Severity) bool {
		return slices.ContainsFunc(alerts, func(a alertRow) bool { return a.Severity == of })
	}
	if has(schema.SeverityWarn) {
		count(&row.Warnings, &row.WarningsExtra, &row.WarningsVariance, s.InclusionProbability)
	}
	if has(schema.SeverityCritical) {
		count(&row.Criticals, &row.CriticalsExtra, &row.CriticalsVariance, s.InclusionProbability)
	}
}

// count counts one score in n, and the requests that it stands for.
func count(n *int, extra, variance *float64, p float64) {
	*n++
	l := lot{*extra, *variance}
	l.draw(p)
	*extra, *variance = l.extra, l.variance
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

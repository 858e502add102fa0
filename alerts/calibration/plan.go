package calibration

import (
	"fmt"
	"slices"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
)

// Config says what a plan calibrates.
type Config struct {
	Key
	Alpha         float64   // false-alarm rate, between 0 and 1
	LimitAlpha    float64   // false-alarm rate of an absolute limit; 0 means no limit
	From, To      time.Time // window of event time that the samples come from
	Labels        []string  // of the model's classes
	WellSampled   []int     // see Options
	ReplaceManual bool      // replace thresholds that were set by hand
}

// Plan is what a calibration would change.
type Plan struct {
	Key
	Alpha      float64   `json:"alpha"`
	WindowFrom time.Time `json:"window_from"`
	WindowTo   time.Time `json:"window_to"`
	Scores     int       `json:"scores"`
	Classes    []Line    `json:"classes"` // the model first, then each class
	WeekScores int       `json:"week_scores"`
	AlertsOld  int       `json:"alerts_old"` // in the last week, had the old thresholds been in force
	AlertsNew  int       `json:"alerts_new"` // likewise, with the new thresholds
	Applied    int64     `json:"applied_change,omitempty"`

	Change []schema.Threshold `json:"-"` // what is set, and what is withdrawn
	Asides []*alerts.Aside    `json:"-"` // thresholds of another severity that will not apply to some classes
}

// Line is what a plan says about the model or one class.
type Line struct {
	Class    *int         `json:"class,omitempty"` // nil for the model
	Label    string       `json:"label"`
	Scores   int          `json:"scores"`
	Missing  int          `json:"missing"`   // further scores that a threshold of the class's own needs
	Old      *float64     `json:"old"`       // value that decides now
	OldScope schema.Scope `json:"old_scope"` // "" if no threshold decides
	New      *float64     `json:"new"`
	NewScope schema.Scope `json:"new_scope"` // "" if no threshold of the severity decides
	Deciding schema.Scope `json:"deciding"`  // scope that decides then, whatever the severity
	Cluster  []int        `json:"cluster,omitempty"`

	SetAside  []schema.Threshold `json:"set_aside,omitempty"` // wider thresholds that will not apply to the class
	N         int                `json:"n"`
	Achieved  float64            `json:"achieved"`
	AlertsOld int                `json:"alerts_old"`
	AlertsNew int                `json:"alerts_new"`
	Kept      bool               `json:"kept,omitempty"` // a threshold that was set by hand stays
}

// NewPlan finds what a calibration on the samples would change. Week holds the scores of the last week, on which the
// plan counts alerts; now holds the thresholds in force. The error says that nothing was changed. It is a *TooFewError
// if the model has too few scores, and refuses thresholds of one scope that contradict each other.
func NewPlan(c Config, samples, week []schema.Sample, now []schema.Threshold) (*Plan, error) {
	p := &Plan{
		Key: c.Key, Alpha: c.Alpha, WindowFrom: c.From, WindowTo: c.To, Scores: len(samples), WeekScores: len(week),
	}
	if len(samples) == 0 {
		return nil, fmt.Errorf("there are no scores of model %s by ensemble %.12s under settings %q from %s to %s: "+
			"nothing was changed",
			c.Model, c.EnsembleDigest, c.Settings, c.From.UTC().Format(time.RFC3339), c.To.UTC().Format(time.RFC3339))
	}
	options := Options{Alpha: c.Alpha, Classes: len(c.Labels), WellSampled: c.WellSampled}
	results, err := Calibrate(samples, options)
	if err != nil {
		return nil, fmt.Errorf("calibrate %s of model %s: %w; nothing was changed", c.Measurement, c.Model, err)
	}
	p.Change = change(c, results, now)
	if c.LimitAlpha != 0 {
		options.Alpha = c.LimitAlpha
		limits, err := Calibrate(samples, options)
		if err != nil {
			return nil, fmt.Errorf("absolute limit of %s: %w; nothing was changed", c.Measurement, err)
		}
		limit := c.threshold(schema.ScopeLimit, limits[0].Bound, c.LimitAlpha)
		limit.Severity = schema.SeverityCritical
		p.Change = append(p.Change, limit)
	}
	if err := schema.CheckChange(now, p.Change); err != nil {
		return nil, fmt.Errorf("calibrate %s of model %s: %w; nothing was changed", c.Measurement, c.Model, err)
	}
	return p, p.describe(c.Labels, samples, week, results, now)
}

// change returns the thresholds of the results. It withdraws what a former calibration set for scopes that have no
// result now, because that would decide instead of the wider scope.
func change(c Config, results []Result, now []schema.Threshold) (set []schema.Threshold) {
	stays := func(t schema.Threshold) bool { return t.Origin == "manual" && !c.ReplaceManual }
	inForce := slices.DeleteFunc(slices.Clone(now), func(t schema.Threshold) bool {
		return !c.Matches(t) || t.Scope == schema.ScopeLimit
	})
	for _, r := range results {
		t := c.threshold(r.Scope, r.Bound, c.Alpha)
		if r.Class >= 0 {
			t.Class = &r.Class
		}
		if !slices.ContainsFunc(inForce, func(o schema.Threshold) bool { return sameScope(o, t) && stays(o) }) {
			set = append(set, t)
		}
	}
	for _, t := range inForce {
		if !stays(t) && !slices.ContainsFunc(set, func(o schema.Threshold) bool { return sameScope(o, t) }) {
			t.Withdrawn = true
			set = append(set, t)
		}
	}
	return set
}

func (c Config) threshold(scope schema.Scope, b Bound, alpha float64) schema.Threshold {
	return schema.Threshold{
		Model: c.Model, EnsembleDigest: c.EnsembleDigest, Settings: c.Settings, Measurement: c.Measurement,
		Scope: scope, Severity: c.Severity, Value: b.Value, Distance: b.Distance, Origin: "calibrated", N: b.N,
		Alpha: &alpha, Achieved: &b.Achieved, WindowFrom: &c.From, WindowTo: &c.To,
	}
}

// sameScope reports whether two thresholds of one key apply to the same classes.
func sameScope(a, b schema.Threshold) bool {
	return a.Scope == b.Scope && (a.Class == nil) == (b.Class == nil) && (a.Class == nil || *a.Class == *b.Class)
}

// planned is the first id of a plan's thresholds. Ids order what replaces what, and the plan's are not known yet.
const planned = int64(1) << 62

// describe fills the lines of the plan.
func (p *Plan) describe(labels []string, samples, week []schema.Sample, results []Result,
	now []schema.Threshold) error {
	then := slices.Clone(now)
	for i, t := range p.Change {
		t.ID = planned + int64(i)
		then = append(then, t)
	}
	before, err := alerts.NewTable(now)
	if err != nil {
		return err
	}
	after, err := alerts.NewTable(then)
	if err != nil {
		return err
	}
	p.Asides = slices.DeleteFunc(after.Asides(p.Series, p.Measurement, len(labels)), func(a *alerts.Aside) bool {
		return a.Threshold.Severity == p.Severity // the lines show these
	})
	scores := map[int][]schema.Sample{}
	for _, s := range samples {
		scores[s.Class] = append(scores[s.Class], s)
	}
	of := map[int]Result{}
	for _, r := range results {
		of[r.Class] = r
	}
	model := p.line(-1, of[-1], before, after)
	model.Label, model.Scores = "(model)", of[-1].Own
	p.Classes = append(p.Classes, model)
	alertsOld, alertsNew := Count(week, p.Key, before), Count(week, p.Key, after)
	for class, label := range labels {
		r, own := of[class]
		if !own {
			r = of[-1]
		}
		l := p.line(class, r, before, after)
		l.Class, l.Label, l.Scores = &class, label, len(scores[class])
		l.Missing = max(0, Needed(p.Alpha)-effective(scores[class]))
		l.AlertsOld, l.AlertsNew = alertsOld[class], alertsNew[class]
		p.Classes = append(p.Classes, l)
	}
	for _, n := range alertsOld {
		p.AlertsOld += n
	}
	for _, n := range alertsNew {
		p.AlertsNew += n
	}
	return nil
}

// line returns which thresholds decide on a class before and after the change.
func (p *Plan) line(class int, r Result, before, after *alerts.Table) Line {
	l := Line{Cluster: r.Cluster}
	if t := before.Applicable(p.Series, p.Measurement, class).Of(p.Severity); t != nil {
		l.Old, l.OldScope = &t.Value, t.Scope
	}
	applies := after.Applicable(p.Series, p.Measurement, class)
	l.Deciding = applies.Scope()
	for _, t := range after.SetAside(p.Series, p.Measurement, class) {
		th := *t
		if th.ID >= planned {
			th.ID = 0
		}
		l.SetAside = append(l.SetAside, th)
	}
	if t := applies.Of(p.Severity); t != nil {
		l.New, l.NewScope, l.N, l.Kept = &t.Value, t.Scope, t.N, t.Origin == "manual"
		if t.Achieved != nil {
			l.Achieved = *t.Achieved
		}
	}
	return l
}

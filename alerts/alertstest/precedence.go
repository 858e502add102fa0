// Package alertstest holds the cases that every user of the rule "which threshold applies" must agree on. It is for
// tests only.
package alertstest

import "github.com/decuwatch/decuwatch/schema"

// Series is the series of the cases' scores.
var Series = schema.Series{Model: "fashion-mnist", EnsembleDigest: "0b5e", Settings: "ddim/20/g2"}

// Class is the class of the cases' scores.
const Class = 3

// Case is one score against one set of thresholds, all on the class gap.
type Case struct {
	Name       string
	Thresholds []schema.Threshold
	Value      float64         // of the score
	Severity   schema.Severity // of the alert, or "" for no alert
	Reason     schema.Reason   // of the finding
	Bounds     []Bound         // that decide: warn before critical, and of one severity the limit last
}

// Bound is a threshold that decides.
type Bound struct {
	Scope    schema.Scope
	Severity schema.Severity
	Value    float64
}

// Of returns the bound of a severity, limits aside.
func (c Case) Of(severity schema.Severity) (Bound, bool) {
	for _, b := range c.Bounds {
		if b.Severity == severity && b.Scope != "limit" {
			return b, true
		}
	}
	return Bound{}, false
}

// Cases returns the cases.
func Cases() []Case { return cases }

const (
	warn     = schema.SeverityWarn
	critical = schema.SeverityCritical
)

func threshold(id int64, scope schema.Scope, severity schema.Severity, value float64) schema.Threshold {
	th := schema.Threshold{
		ID: id, Model: Series.Model, EnsembleDigest: Series.EnsembleDigest, Settings: Series.Settings,
		Measurement: schema.ClassGap, Scope: scope, Severity: severity, Value: value, Origin: "calibrated",
	}
	if scope == schema.ScopeClass || scope == schema.ScopeCluster {
		class := Class
		th.Class = &class
	}
	return th
}

func other(th schema.Threshold, change func(*schema.Threshold)) schema.Threshold {
	change(&th)
	return th
}

var cases = []Case{
	{Name: "no threshold", Value: 1, Reason: "no_threshold"},
	{
		Name: "a class's warn sets the model's critical aside", Value: 200,
		Thresholds: []schema.Threshold{threshold(1, "class", warn, 104), threshold(2, "model", critical, 8.8)},
		Severity:   warn, Reason: "class_threshold", Bounds: []Bound{{"class", warn, 104}},
	},
	{
		Name: "below the class's warn, above the model's critical", Value: 50,
		Thresholds: []schema.Threshold{threshold(3, "model", critical, 8.8), threshold(4, "class", warn, 104)},
		Reason:     "below_threshold", Bounds: []Bound{{"class", warn, 104}},
	},
	{
		Name: "a class's critical sets the model's warn aside", Value: 5,
		Thresholds: []schema.Threshold{threshold(5, "class", critical, 9), threshold(6, "model", warn, 2)},
		Reason:     "below_threshold", Bounds: []Bound{{"class", critical, 9}},
	},
	{
		Name: "a cluster's warn sets the model's critical aside", Value: 5,
		Thresholds: []schema.Threshold{threshold(7, "cluster", warn, 2), threshold(8, "model", critical, 3),
			threshold(9, "model", warn, 1)},
		Severity: warn, Reason: "cluster_threshold", Bounds: []Bound{{"cluster", warn, 2}},
	},
	{
		Name: "a class's critical sets its cluster's warn aside", Value: 5,
		Thresholds: []schema.Threshold{threshold(10, "cluster", warn, 2), threshold(11, "class", critical, 4)},
		Severity:   critical, Reason: "class_threshold", Bounds: []Bound{{"class", critical, 4}},
	},
	{
		Name: "both severities of one scope", Value: 5,
		Thresholds: []schema.Threshold{threshold(12, "model", critical, 9), threshold(13, "model", warn, 2)},
		Severity:   warn, Reason: "model_threshold", Bounds: []Bound{{"model", warn, 2}, {"model", critical, 9}},
	},
	{
		Name: "the limit beside a class's warn", Value: 300,
		Thresholds: []schema.Threshold{
			threshold(14, "class", warn, 104), threshold(15, "limit", critical, 250), threshold(16, "model", critical, 8.8),
		},
		Severity: critical, Reason: "absolute_limit", Bounds: []Bound{{"class", warn, 104}, {"limit", critical, 250}},
	},
	{
		Name: "the limit alone", Value: 3, Thresholds: []schema.Threshold{threshold(17, "limit", warn, 2)},
		Severity: warn, Reason: "absolute_limit", Bounds: []Bound{{"limit", warn, 2}},
	},
	{
		Name: "another class's threshold", Value: 5,
		Thresholds: []schema.Threshold{
			other(threshold(18, "class", warn, 9), func(th *schema.Threshold) { class := Class + 1; th.Class = &class }),
			threshold(19, "model", critical, 4),
		},
		Severity: critical, Reason: "model_threshold", Bounds: []Bound{{"model", critical, 4}},
	},
	{
		Name: "another measurement, ensemble and settings", Value: 5,
		Thresholds: []schema.Threshold{
			other(threshold(20, "class", warn, 1), func(th *schema.Threshold) { th.Measurement = schema.RequestRisk }),
			other(threshold(21, "class", warn, 1), func(th *schema.Threshold) { th.EnsembleDigest = "another" }),
			other(threshold(22, "class", warn, 1), func(th *schema.Threshold) { th.Settings = "another" }),
			threshold(23, "model", warn, 6),
		},
		Reason: "below_threshold", Bounds: []Bound{{"model", warn, 6}},
	},
	{
		Name: "a newer threshold of the key", Value: 5,
		Thresholds: []schema.Threshold{threshold(24, "class", warn, 1), threshold(25, "class", warn, 6),
			threshold(26, "model", critical, 2)},
		Reason: "below_threshold", Bounds: []Bound{{"class", warn, 6}},
	},
	{
		Name: "a withdrawn class threshold", Value: 5,
		Thresholds: []schema.Threshold{
			threshold(27, "class", warn, 6), threshold(28, "model", critical, 2),
			other(threshold(29, "class", warn, 6), func(th *schema.Threshold) { th.Withdrawn = true }),
		},
		Severity: critical, Reason: "model_threshold", Bounds: []Bound{{"model", critical, 2}},
	},
}

// Score returns the score of a case.
func (c Case) Score() schema.Score {
	return schema.Score{
		Event: schema.Event{Source: "//test", ID: "1", Data: schema.Generation{Model: Series.Model}}, ClassIndex: Class,
		ClassGap: schema.Measurement{Value: c.Value}, Receipt: schema.Receipt{EnsembleDigest: Series.EnsembleDigest,
			Settings: Series.Settings},
	}
}

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
func Cases() []Case {
	var id int64
	threshold := func(scope schema.Scope, severity schema.Severity, value float64) schema.Threshold {
		id++
		th := schema.Threshold{
			ID: id, Model: Series.Model, EnsembleDigest: Series.EnsembleDigest, Settings: Series.Settings,
			Measurement: schema.ClassGap, Scope: scope, Severity: severity, Value: value, Origin: "calibrated",
		}
		if scope == "class" || scope == "cluster" {
			class := Class
			th.Class = &class
		}
		return th
	}
	other := func(th schema.Threshold, change func(*schema.Threshold)) schema.Threshold { change(&th); return th }
	const warn, critical = schema.SeverityWarn, schema.SeverityCritical
	return []Case{
		{Name: "no threshold", Value: 1, Reason: "no_threshold"},
		{
			Name: "a class's warn sets the model's critical aside", Value: 200,
			Thresholds: []schema.Threshold{threshold("class", warn, 104), threshold("model", critical, 8.8)},
			Severity:   warn, Reason: "class_threshold", Bounds: []Bound{{"class", warn, 104}},
		},
		{
			Name: "below the class's warn, above the model's critical", Value: 50,
			Thresholds: []schema.Threshold{threshold("model", critical, 8.8), threshold("class", warn, 104)},
			Reason:     "below_threshold", Bounds: []Bound{{"class", warn, 104}},
		},
		{
			Name: "a class's critical sets the model's warn aside", Value: 5,
			Thresholds: []schema.Threshold{threshold("class", critical, 9), threshold("model", warn, 2)},
			Reason:     "below_threshold", Bounds: []Bound{{"class", critical, 9}},
		},
		{
			Name: "a cluster's warn sets the model's critical aside", Value: 5,
			Thresholds: []schema.Threshold{threshold("cluster", warn, 2), threshold("model", critical, 3),
				threshold("model", warn, 1)},
			Severity: warn, Reason: "cluster_threshold", Bounds: []Bound{{"cluster", warn, 2}},
		},
		{
			Name: "a class's critical sets its cluster's warn aside", Value: 5,
			Thresholds: []schema.Threshold{threshold("cluster", warn, 2), threshold("class", critical, 4)},
			Severity:   critical, Reason: "class_threshold", Bounds: []Bound{{"class", critical, 4}},
		},
		{
			Name: "both severities of one scope", Value: 5,
			Thresholds: []schema.Threshold{threshold("model", critical, 9), threshold("model", warn, 2)},
			Severity:   warn, Reason: "model_threshold", Bounds: []Bound{{"model", warn, 2}, {"model", critical, 9}},
		},
		{
			Name: "the limit beside a class's warn", Value: 300,
			Thresholds: []schema.Threshold{
				threshold("class", warn, 104), threshold("limit", critical, 250), threshold("model", critical, 8.8),
			},
			Severity: critical, Reason: "absolute_limit", Bounds: []Bound{{"class", warn, 104}, {"limit", critical, 250}},
		},
		{
			Name: "the limit alone", Value: 3, Thresholds: []schema.Threshold{threshold("limit", warn, 2)},
			Severity: warn, Reason: "absolute_limit", Bounds: []Bound{{"limit", warn, 2}},
		},
		{
			Name: "another class's threshold", Value: 5,
			Thresholds: []schema.Threshold{
				other(threshold("class", warn, 9), func(th *schema.Threshold) { class := Class + 1; th.Class = &class }),
				threshold("model", critical, 4),
			},
			Severity: critical, Reason: "model_threshold", Bounds: []Bound{{"model", critical, 4}},
		},
		{
			Name: "another measurement, ensemble and settings", Value: 5,
			Thresholds: []schema.Threshold{
				other(threshold("class", warn, 1), func(th *schema.Threshold) { th.Measurement = schema.RequestRisk }),
				other(threshold("class", warn, 1), func(th *schema.Threshold) { th.EnsembleDigest = "another" }),
				other(threshold("class", warn, 1), func(th *schema.Threshold) { th.Settings = "another" }),
				threshold("model", warn, 6),
			},
			Reason: "below_threshold", Bounds: []Bound{{"model", warn, 6}},
		},
		{
			Name: "a newer threshold of the key", Value: 5,
			Thresholds: []schema.Threshold{threshold("class", warn, 1), threshold("class", warn, 6),
				threshold("model", critical, 2)},
			Reason: "below_threshold", Bounds: []Bound{{"class", warn, 6}},
		},
		{
			Name: "a withdrawn class threshold", Value: 5,
			Thresholds: []schema.Threshold{
				threshold("class", warn, 6), threshold("model", critical, 2),
				other(threshold("class", warn, 6), func(th *schema.Threshold) { th.Withdrawn = true }),
			},
			Severity: critical, Reason: "model_threshold", Bounds: []Bound{{"model", critical, 2}},
		},
	}
}

// Score returns the score of a case.
func (c Case) Score() schema.Score {
	return schema.Score{
		Event: schema.Event{Source: "//test", ID: "1", Data: schema.Generation{Model: Series.Model}}, ClassIndex: Class,
		ClassGap: schema.Measurement{Value: c.Value}, Receipt: schema.Receipt{EnsembleDigest: Series.EnsembleDigest,
			Settings: Series.Settings},
	}
}

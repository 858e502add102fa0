package calibration

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
)

// Impact is what a change of thresholds does to the alerts of the last week.
type Impact struct {
	Change   []schema.Threshold `json:"change"`
	Measured []MeasuredImpact   `json:"measurements"` // those that the change is about
	Applied  int64              `json:"applied,omitempty"`
}

// MeasuredImpact counts the alerts of one measurement on the scores of the last week.
type MeasuredImpact struct {
	Measurement schema.MeasurementName `json:"measurement"`
	Scores      int                    `json:"scores"`
	AlertsOld   int                    `json:"alerts_old"` // with the thresholds in force
	AlertsNew   int                    `json:"alerts_new"` // after the change
}

// NewImpact counts the alerts of a series on the scores of the last week, by measurement, with the thresholds in force
// and after the change. The error wraps [schema.ErrContradiction] if the change would be refused.
func NewImpact(
	series schema.Series, change []schema.Threshold, week map[schema.MeasurementName][]schema.Sample,
	now []schema.Threshold,
) (*Impact, error) {
	if err := schema.CheckChange(now, change); err != nil {
		return nil, err
	}
	then := slices.Clone(now)
	for i, t := range change {
		t.ID = planned + int64(i)
		then = append(then, t)
	}
	before, err := alerts.NewTable(now)
	if err != nil {
		return nil, err
	}
	after, err := alerts.NewTable(then)
	if err != nil {
		return nil, err
	}
	impact := &Impact{Change: change}
	for _, name := range schema.MeasurementNames() {
		if !slices.ContainsFunc(change, func(t schema.Threshold) bool { return t.Measurement == name }) {
			continue
		}
		key := Key{Series: series, Measurement: name}
		m := MeasuredImpact{Measurement: name, Scores: len(week[name])}
		for _, n := range Count(week[name], key, before) {
			m.AlertsOld += n
		}
		for _, n := range Count(week[name], key, after) {
			m.AlertsNew += n
		}
		impact.Measured = append(impact.Measured, m)
	}
	return impact, nil
}

// Print writes the impact as text.
func (i *Impact) Print(out io.Writer) error {
	for _, m := range i.Measured {
		if _, err := fmt.Fprintf(out, "Alerts of %s on the %d scores of the last week: %d with the old thresholds, %d with "+
			"the new.\n", m.Measurement, m.Scores, m.AlertsOld, m.AlertsNew); err != nil {
			return err
		}
	}
	return nil
}

// referenceQuantiles are the quantiles of a reference that become thresholds.
var referenceQuantiles = []struct {
	quantile float64
	severity schema.Severity
}{{0.99, schema.SeverityWarn}, {0.999, schema.SeverityCritical}}

// FromReference returns the model's thresholds of a measurement from the quantiles of its reference, n scores of the
// well-sampled classes: warn from the 0.99 quantile, critical from the 0.999 quantile. A quantile that the reference
// lacks gives no threshold.
func FromReference(
	series schema.Series, measurement schema.MeasurementName, quantiles map[string]float64, n int,
) (list []schema.Threshold) {
	for _, q := range referenceQuantiles {
		value, ok := quantiles[strconv.FormatFloat(q.quantile, 'g', -1, 64)]
		if !ok {
			continue
		}
		alpha := math.Round((1-q.quantile)*1e6) / 1e6
		list = append(list, schema.Threshold{
			Model: series.Model, EnsembleDigest: series.EnsembleDigest, Settings: series.Settings, Measurement: measurement,
			Scope: schema.ScopeModel, Severity: q.severity, Value: value, Origin: "reference", N: n, Alpha: &alpha,
		})
	}
	return list
}

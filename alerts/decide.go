// Package alerts decides which scores raise an alert and brings alerts to whoever subscribed.
//
// [Decide] is a pure function of a score and a [Table] of thresholds; [Thresholds] keeps the current table; [Relay]
// sends committed alerts from the outbox to each [Sink] until the sink has taken them.
package alerts

import (
	"maps"
	"slices"

	"github.com/decuwatch/decuwatch/schema"
)

// Fallback is why a class's own threshold did not decide.
type Fallback string

// Fallbacks of a finding.
const (
	FallbackCluster Fallback = "cluster" // its cluster's did
	FallbackModel   Fallback = "model"   // its model's did
	FallbackMissing Fallback = "missing" // there is no threshold; at most the absolute limit decided
	FallbackStale   Fallback = "stale"   // there is one for another ensemble or other settings only; at most the limit did
)

// Fallbacks lists all fallbacks.
func Fallbacks() []Fallback {
	return []Fallback{FallbackCluster, FallbackModel, FallbackMissing, FallbackStale}
}

// Finding is what was decided on one measurement of a score.
type Finding struct {
	Measurement schema.MeasurementName
	Reason      schema.Reason   // why an alert fired, or why it did not
	Severity    schema.Severity // warn or critical; "" if no alert fired
	Fallback    Fallback        // why the class's own threshold did not decide; "" if it did
	Saturated   bool            // the measurement stood at its upper bound and its mean distance was compared
}

// Decision is what was decided on a score.
type Decision struct {
	Alerts   []schema.Alert // one at most for each measurement, in the order of schema.MeasurementNames
	Findings []Finding      // one for each measurement that the score has, in the same order
}

// Decide holds a score against the thresholds. It is pure: the same score and table give the same decision.
//
// The thresholds of a measurement are those that were set for the score's model, ensemble digest and settings. The
// class's own decide if it has any, of whichever severity; else those of its cluster; else the model's
// ([Table.Applicable] has the rule). The absolute limit applies beside them, so that a class that is always uncertain
// does not hide behind its own high threshold. An alert fires if the value is at least the threshold's; of those
// that fire the highest severity makes the alert, and between equals the more specific.
//
// A saturated measurement stands at its upper bound like all others, so its mean distance is compared with the
// threshold's distance. If a threshold has no distance, the value is compared, which fires: a saturated score is never
// passed over.
//
// What was not measured has no finding and never alerts.
//
// A nil table holds no thresholds. Numbers of the score must be finite.
func Decide(s schema.Score, t *Table) Decision {
	var d Decision
	for _, m := range s.Measurements() {
		f := Finding{Measurement: m.Name}
		applies := t.Applicable(s.Series(), m.Name, s.ClassIndex)
		f.Fallback = applies.Fallback
		var fired *schema.Threshold
		var decided float64
		for _, th := range slices.Concat(applies.Limits, applies.Thresholds) {
			number, bound, byDistance := Compared(m.Measurement, th)
			f.Saturated = f.Saturated || byDistance
			// The limit comes first, so that at equal severity the more specific threshold replaces it.
			if number >= bound && (fired == nil || rank(th.Severity) >= rank(fired.Severity)) {
				fired, decided = th, number
			}
		}
		switch {
		case fired != nil:
			f.Reason, f.Severity = reasons[fired.Scope], fired.Severity
			d.Alerts = append(d.Alerts, alert(s, m.Name, m.Measurement, fired, decided))
		case applies.Fallback == FallbackStale:
			f.Reason = schema.ReasonStale
		case len(applies.All()) == 0:
			f.Reason = schema.ReasonNone
		default:
			f.Reason = schema.ReasonBelow
		}
		d.Findings = append(d.Findings, f)
	}
	return d
}

// Compared returns the number of a measurement that decides against a threshold, and the bound that it is held against:
// the mean distance if the measurement is saturated and the threshold has a distance, else the value.
func Compared(m schema.Measurement, th *schema.Threshold) (number, bound float64, byDistance bool) {
	if m.Saturated && th.Distance != nil {
		return m.MeanDistance, *th.Distance, true
	}
	return m.Value, th.Value, false
}

// reasons are the reasons by the scope of the threshold that was reached.
var reasons = map[schema.Scope]schema.Reason{
	schema.ScopeClass: schema.ReasonClass, schema.ScopeCluster: schema.ReasonCluster,
	schema.ScopeModel: schema.ReasonModel, schema.ScopeLimit: schema.ReasonLimit,
}

// rank orders severities.
func rank(severity schema.Severity) int {
	if severity == schema.SeverityCritical {
		return 2
	}
	return 1
}

func alert(s schema.Score, name schema.MeasurementName, m schema.Measurement, th *schema.Threshold,
	decided float64) schema.Alert {
	_, bound, _ := Compared(m, th)
	a := schema.Alert{
		ID:          ID(s.Event.Source, s.Event.ID, s.Receipt.EnsembleDigest, name),
		Kind:        schema.AlertScore,
		Source:      s.Event.Source,
		EventID:     s.Event.ID,
		EventTime:   s.Event.Time,
		Model:       s.Event.Data.Model,
		ClassIndex:  s.ClassIndex,
		ClassLabel:  s.ClassLabel,
		Labels:      maps.Clone(s.Event.Data.Labels),
		Severity:    th.Severity,
		Reason:      reasons[th.Scope],
		Measurement: name,
		Value:       m.Value,
		Decided:     decided,
		Threshold:   bound,
		ThresholdID: th.ID,
		Saturated:   m.Saturated,
		ClassGap:    s.ClassGap.Value,
		Receipt:     s.Receipt,
		FiredAt:     s.ScoredAt,
		TraceParent: s.Event.TraceParent,
	}
	if s.RequestRisk != nil {
		a.RequestRisk = &s.RequestRisk.Value
	}
	if s.ImageRisk != nil {
		a.ImageRisk = &s.ImageRisk.Value
	}
	return a
}

// ID returns the identifier of the alert on one measurement of one event by one ensemble: 32 hexadecimal digits, the
// same on every try.
func ID(source, id, ensembleDigest string, measurement schema.MeasurementName) string {
	return schema.ID("alert", source, id, ensembleDigest, string(measurement))
}

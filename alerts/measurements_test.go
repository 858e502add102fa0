package alerts_test

import (
	"testing"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/schema"
)

// Every measurement is decided alike. The one that a score lacks is never taken for 0: it has no finding and no alert,
// whatever the thresholds.
func TestEveryMeasurementIsDecided(t *testing.T) {
	series := schema.Series{Model: "m", EnsembleDigest: "d", Settings: "s"}
	for _, name := range schema.MeasurementNames() {
		for _, scope := range []schema.Scope{schema.ScopeModel, schema.ScopeLimit} {
			table, err := alerts.NewTable([]schema.Threshold{{
				ID: 1, Model: "m", EnsembleDigest: "d", Settings: "s", Measurement: name, Scope: scope,
				Severity: schema.SeverityWarn, Value: 0,
			}})
			if err != nil {
				t.Fatal(err)
			}
			score := schema.Score{
				Event:       schema.Event{Data: schema.Generation{Model: "m"}},
				ClassGap:    schema.Measurement{Value: -1},
				RequestRisk: &schema.Measurement{Value: -1},
				Receipt:     schema.Receipt{EnsembleDigest: "d", Settings: "s"}, ImageRiskReason: schema.JudgeCannotTell,
			}
			d := alerts.Decide(score, table)
			if len(d.Alerts) != 0 || len(d.Findings) != 2 {
				t.Errorf("%s, %s: a score without an image risk has %d alerts and %d findings", name, scope, len(d.Alerts),
					len(d.Findings))
			}
			score.SetMeasurement(name, schema.Measurement{Value: 0.5})
			d = alerts.Decide(score, table)
			if len(d.Alerts) != 1 || d.Alerts[0].Measurement != name || d.Alerts[0].Value != 0.5 ||
				len(d.Findings) != len(score.Measurements()) {
				t.Errorf("%s, %s: alerts %+v, findings %+v", name, scope, d.Alerts, d.Findings)
			}
			if measured := d.Alerts[0].ImageRisk != nil; measured != (name == schema.ImageRisk) {
				t.Errorf("%s, %s: the alert has the image risk %v", name, scope, d.Alerts[0].ImageRisk)
			}
			// A calibration counts as live scores are decided.
			counts := calibration.Count([]schema.Sample{{Class: 2, Value: 0.5}, {Class: 2, Value: -1}},
				calibration.Key{Series: series, Measurement: name, Severity: schema.SeverityWarn}, table)
			if counts[2] != 1 {
				t.Errorf("%s, %s: %d alerts are counted, want 1", name, scope, counts[2])
			}
		}
	}
	for _, name := range []schema.MeasurementName{"", "x"} {
		_, err := alerts.NewTable([]schema.Threshold{{Measurement: name, Scope: schema.ScopeModel,
			Severity: schema.SeverityWarn}})
		if err == nil {
			t.Errorf("a threshold of the measurement %q", name)
		}
	}
}

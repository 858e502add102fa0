package main

import (
	"testing"

	"github.com/decuwatch/decuwatch/alerts/alertstest"
	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// A plan says of each class what Decide decides on, for each severity.
func TestPlanPrecedence(t *testing.T) {
	e, err := ensemble.Open(shippedEnsemble)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range alertstest.Cases() {
		for _, severity := range []schema.Severity{schema.SeverityWarn, schema.SeverityCritical} {
			t.Run(c.Name+"/"+string(severity), func(t *testing.T) {
				p := &calibrationPlan{
					Model: alertstest.Series.Model, EnsembleDigest: alertstest.Series.EnsembleDigest, Settings: alertstest.Series.Settings,
					Measurement: schema.ClassGap, Severity: severity, Alpha: 0.1,
				}
				key := calibration.Key{Series: p.series(), Measurement: p.Measurement, Severity: severity}
				sample := []schema.Sample{{Class: alertstest.Class, Value: c.Value}}
				week := func() ([]schema.Sample, error) { return sample, nil }
				if err := p.describe(key, e, sample, nil, c.Thresholds, week); err != nil {
					t.Fatal(err)
				}
				line := p.Classes[1+alertstest.Class]
				want, decides := c.Of(severity)
				if (line.Old != nil) != decides || (line.New != nil) != decides || line.OldScope != want.Scope || line.NewScope != want.Scope {
					t.Fatalf("line is %+v, want %+v", line, want)
				}
				if decides && (*line.Old != want.Value || *line.New != want.Value) {
					t.Errorf("old %g, new %g, want %g", *line.Old, *line.New, want.Value)
				}
				alerts := 0
				if c.Severity != "" {
					alerts = 1
				}
				if p.AlertsOld != alerts || p.AlertsNew != alerts {
					t.Errorf("alerts: old %d, new %d, want %d", p.AlertsOld, p.AlertsNew, alerts)
				}
			})
		}
	}
}

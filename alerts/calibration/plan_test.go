package calibration

import (
	"testing"

	"github.com/decuwatch/decuwatch/alerts/alertstest"
	"github.com/decuwatch/decuwatch/schema"
)

// A plan says of each class what Decide decides on, for each severity.
func TestPlanPrecedence(t *testing.T) {
	for _, c := range alertstest.Cases() {
		for _, severity := range schema.Severities() {
			t.Run(c.Name+"/"+string(severity), func(t *testing.T) {
				p := &Plan{Key: Key{Series: alertstest.Series, Measurement: schema.ClassGap, Severity: severity}, Alpha: 0.1}
				sample := []schema.Sample{{Class: alertstest.Class, Value: c.Value}}
				if err := p.describe(make([]string, 10), sample, sample, nil, c.Thresholds); err != nil {
					t.Fatal(err)
				}
				line := p.Classes[1+alertstest.Class]
				want, decides := c.Of(severity)
				if (line.Old != nil) != decides || (line.New != nil) != decides || line.OldScope != want.Scope ||
					line.NewScope != want.Scope {
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

package calibration

import (
	"fmt"
	"slices"
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

// A calibration replaces what it finds, leaves what was set by hand, and withdraws what it no longer finds.
func TestChange(t *testing.T) {
	key := Key{Series: alertstest.Series, Measurement: schema.ClassGap, Severity: schema.SeverityWarn}
	inForce := func(scope schema.Scope, class int, origin string) schema.Threshold {
		th := Config{Key: key}.threshold(scope, Bound{Value: 9}, 0.1)
		th.Origin = origin
		if class >= 0 {
			th.Class = &class
		}
		return th
	}
	critical := inForce(schema.ScopeClass, 3, "calibrated")
	critical.Severity = schema.SeverityCritical
	now := []schema.Threshold{
		inForce(schema.ScopeModel, -1, "calibrated"), inForce(schema.ScopeClass, 0, "manual"),
		inForce(schema.ScopeClass, 1, "calibrated"), inForce(schema.ScopeClass, 2, "manual"),
		inForce(schema.ScopeLimit, -1, "calibrated"), critical,
	}
	results := []Result{
		{Scope: schema.ScopeModel, Class: -1, Bound: Bound{Value: 1}},
		{Scope: schema.ScopeClass, Class: 0, Bound: Bound{Value: 2}},
		{Scope: schema.ScopeCluster, Class: 1, Bound: Bound{Value: 3}},
	}
	for replace, want := range map[bool][]string{
		false: {"model -1 1", "cluster 1 3", "class 1 withdrawn"},
		true:  {"model -1 1", "class 0 2", "cluster 1 3", "class 1 withdrawn", "class 2 withdrawn"},
	} {
		var got []string
		for _, th := range change(Config{Key: key, ReplaceManual: replace}, results, now) {
			class, what := -1, fmt.Sprint(th.Value)
			if th.Class != nil {
				class = *th.Class
			}
			if th.Withdrawn {
				what = "withdrawn"
			}
			got = append(got, fmt.Sprintf("%s %d %s", th.Scope, class, what))
		}
		if !slices.Equal(got, want) {
			t.Errorf("replace manual %t: %q, want %q", replace, got, want)
		}
	}
}

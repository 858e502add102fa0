package review

import (
	"slices"
	"testing"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/alertstest"
	"github.com/decuwatch/decuwatch/schema"
)

func TestBounds(t *testing.T) {
	for _, c := range alertstest.Cases() {
		t.Run(c.Name, func(t *testing.T) {
			table, err := alerts.NewTable(c.Thresholds)
			if err != nil {
				t.Fatal(err)
			}
			score := c.Score()
			var drawn []alertstest.Bound
			for _, b := range bounds(table, &score, schema.ClassGap, score.ClassGap) {
				drawn = append(drawn, alertstest.Bound{Scope: b.Scope, Severity: b.Severity, Value: b.Value})
			}
			if !slices.Equal(drawn, c.Bounds) {
				t.Errorf("drawn are %+v, want %+v", drawn, c.Bounds)
			}
		})
	}
}

// A saturated score is held against a threshold's distance, and the line says so.
func TestBoundsOfASaturatedScore(t *testing.T) {
	c := alertstest.Cases()[1]
	distance := 40.0
	c.Thresholds[0].Distance = &distance
	table, err := alerts.NewTable(c.Thresholds)
	if err != nil {
		t.Fatal(err)
	}
	score := c.Score()
	for saturated, want := range map[bool]string{false: "warn 104", true: "warn at mean distance 40.0"} {
		score.ClassGap.Saturated = saturated
		if drawn := bounds(table, &score, schema.ClassGap, score.ClassGap); len(drawn) != 1 || drawn[0].text() != want {
			t.Errorf("saturated %t: drawn are %+v, want %q", saturated, drawn, want)
		}
	}
}

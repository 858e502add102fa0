package review_test

import (
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
)

// The page shows no threshold as in force that a class's own one has set aside.
func TestPageDrawsWhatDecides(t *testing.T) {
	b := newBench(t, tiny)
	score, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	b.record(request{class: 0, seed: 2})
	th := schema.Threshold{
		Model: score.Series().Model, EnsembleDigest: score.Series().EnsembleDigest, Settings: score.Series().Settings,
		Measurement: schema.ClassGap, Scope: "model", Severity: schema.SeverityCritical, Value: score.ClassGap.Value / 4,
		Origin: "manual", SetBy: "ada", Reason: "test",
	}
	set := func() {
		t.Helper()
		if _, err := b.store.SetThreshold(t.Context(), th); err != nil {
			t.Fatal(err)
		}
	}
	site := servePage(t, b.store, review.PageConfig{})
	shows := func(severity schema.Severity) bool {
		t.Helper()
		status, _, text := ask(t, "GET", site.URL+"/review/"+id, nil, nil)
		if status != 200 {
			t.Fatalf("status %d: %s", status, text)
		}
		return strings.Contains(text, `class="bound `+string(severity)+`"`)
	}
	set()
	if !shows(schema.SeverityCritical) {
		t.Error("the model's critical threshold decides alone and is not shown")
	}
	class := 0
	th.Scope, th.Class, th.Severity, th.Value = "class", &class, schema.SeverityWarn, score.ClassGap.Value/2
	set()
	if shows(schema.SeverityCritical) || !shows(schema.SeverityWarn) {
		t.Error("the class's warn threshold decides, and the page shows another")
	}
}

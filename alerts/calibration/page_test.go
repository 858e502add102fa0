package calibration_test

import (
	"bytes"
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/schema"
)

var update = flag.Bool("update", false, "write the sample plan in docs/thresholds.md anew")

// The sample plan of docs/thresholds.md is what the program prints.
func TestSamplePlan(t *testing.T) {
	to := time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)
	series := schema.Series{Model: "fashion-mnist", EnsembleDigest: "47700176e23f", Settings: "fixed"}
	config := calibration.Config{
		Key:   calibration.Key{Series: series, Measurement: schema.RequestRisk, Severity: schema.SeverityWarn},
		Alpha: 0.05, From: to.Add(-720 * time.Hour), To: to, WellSampled: []int{0, 1},
		Labels: []string{"Ankle boot", "Coat", "Bag", "Shirt"},
	}
	var samples []schema.Sample
	for class, n := range []int{50, 50, 40, 20} {
		for i := range n {
			value := 0.001 * float64(class+1) * (1 + float64(i*37%50)/25)
			samples = append(samples, schema.Sample{Class: class, Value: value, Distance: value})
		}
	}
	old := []schema.Threshold{{ID: 1, Model: series.Model, EnsembleDigest: series.EnsembleDigest,
		Settings:    series.Settings,
		Measurement: schema.RequestRisk, Scope: schema.ScopeModel, Severity: schema.SeverityWarn, Value: 0.005,
		Origin: "reference"}}
	plan, err := calibration.NewPlan(config, samples, samples, old)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := plan.Print(&out); err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`(?m) +$`).ReplaceAllString(out.String(), "")

	const path = "../../docs/thresholds.md"
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(content), "\n```\n")
	got, after, ok := strings.Cut(rest, "```\n")
	switch {
	case !ok:
		t.Fatal("the page has no sample")
	case got == want:
	case *update:
		page := before + "\n```\n" + want + "```\n" + after
		if err := os.WriteFile(path, []byte(page), 0o644); err != nil { //nolint:gosec // a page
			t.Fatal(err)
		}
	default:
		t.Errorf("the sample is stale; write it with: go test ./alerts/calibration -run SamplePlan -update\n"+
			"it is\n%s\nand must be\n%s", got, want)
	}
}

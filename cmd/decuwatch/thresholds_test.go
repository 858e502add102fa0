package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Setting a threshold says what no longer applies, and a contradiction is refused by name.
func TestThresholdsSetSaysWhatItSetsAside(t *testing.T) {
	url := pgtest.URL(t)
	set := func(args ...string) (string, string, int) {
		return verb(t, append([]string{"thresholds", "set", shippedEnsemble, "--measurement=request_risk", "--reason=test",
			"--postgres.url", url}, args...)...)
	}
	for _, c := range []struct {
		name string
		args []string
		says []string
		not  string
		fail string // what the refusal says
	}{
		{name: "the first", args: []string{"--value=8.8", "--severity=critical"}, not: "does not apply"},
		{
			name: "a class's warn", args: []string{"--value=104", "--class=Bag"},
			says: []string{"the model's critical threshold 8.8 does not apply to classes with more specific thresholds: 8 Bag"},
		},
		{name: "another class's", args: []string{"--value=9", "--class=Coat"}, says: []string{"4 Coat, 8 Bag"}},
		{
			name: "a model's threshold that does not reach every class", args: []string{"--value=5"},
			says: []string{"the model's warn threshold 5 does not apply", "4 Coat, 8 Bag"}, not: "critical threshold 8.8",
		},
		{name: "a limit sets nothing aside", args: []string{"--value=3", "--limit", "--severity=critical"},
			not: "does not apply"},
		{name: "a class's critical below its warn", args: []string{"--value=103", "--class=Bag", "--severity=critical"},
			fail: "scope class, class 8: critical value 103 is below warn value 104"},
		{name: "the model's warn above its critical", args: []string{"--value=9"},
			fail: "scope model: critical value 8.8 is below warn value 9"},
		{name: "a limit's warn above its critical", args: []string{"--value=4", "--limit"},
			fail: "scope limit: critical value 3 is below warn value 4"},
		{name: "a distance", args: []string{"--value=104", "--distance=40", "--class=Bag"}, says: []string{"8 Bag"}},
		{name: "a critical distance below", args: []string{"--value=105", "--distance=39", "--class=Bag",
			"--severity=critical"}, fail: "critical distance 39 is below warn distance 40"},
		{name: "a critical without a distance", args: []string{"--value=105", "--class=Bag", "--severity=critical"},
			fail: "critical has no distance"},
		{name: "a critical that agrees", args: []string{"--value=105", "--distance=41", "--class=Bag",
			"--severity=critical"}, says: []string{"8 Bag"}},
	} {
		stdout, stderr, code := set(c.args...)
		if c.fail != "" {
			if code != exitFailed || !strings.Contains(stderr, c.fail) ||
				!strings.Contains(stderr, "request_risk of fashion-mnist") {
				t.Errorf("%s: code %d, %q, want a refusal that says %q", c.name, code, stderr, c.fail)
			}
			continue
		}
		if code != exitOK {
			t.Fatalf("%s: %d %s", c.name, code, stderr)
		}
		for _, want := range c.says {
			if !strings.Contains(stdout, want) {
				t.Errorf("%s: says %q, want %q", c.name, stdout, want)
			}
		}
		if c.not != "" && strings.Contains(stdout, c.not) {
			t.Errorf("%s: says %q", c.name, stdout)
		}
	}
}

// A calibration says which thresholds of the other severity it sets aside, and is refused if it contradicts them.
func TestCalibrateSaysWhatItSetsAside(t *testing.T) {
	url := pgtest.URL(t)
	store, err := postgres.Open(t.Context(), postgres.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	e, err := ensemble.Open(shippedEnsemble)
	if err != nil {
		t.Fatal(err)
	}
	storeScores(t, store, e, []int{0, 0, 0, 0, 40, 0, 0, 0, 0, 40},
		func(class int) float64 { return []float64{0, 0, 0, 0, 10, 0, 0, 0, 0, 50}[class] })
	run := func(args ...string) (string, string, int) {
		return verb(t, append([]string{"thresholds", args[0], shippedEnsemble, "--measurement=request_risk", "--reason=test",
			"--postgres.url", url}, args[1:]...)...)
	}
	if _, stderr, code := run("set", "--value=99", "--severity=critical"); code != exitOK {
		t.Fatal(stderr)
	}
	aside := "the model's critical threshold 99 does not apply to classes with more specific thresholds: 4 Coat, 9 " +
		"Ankle boot"
	for _, apply := range [][]string{nil, {"--apply"}} {
		stdout, stderr, code := run(append([]string{"calibrate", "--alpha=0.05"}, apply...)...)
		if code != exitOK || !strings.Contains(stdout, aside) {
			t.Errorf("%d %s%s", code, stdout, stderr)
		}
	}
	stdout, _, _ := run("calibrate", "--alpha=0.05", "--json")
	var plan calibration.Plan
	if err := json.Unmarshal([]byte(stdout), &plan); err != nil {
		t.Fatal(err)
	}
	if line := plan.Classes[5]; len(line.SetAside) != 2 || line.SetAside[0].Severity != "warn" ||
		line.SetAside[1].Value != 99 {
		t.Errorf("%+v", line)
	}

	// Too few scores for a critical threshold of a class: the plan shows that the model's does not reach it.
	stdout, stderr, code := run("calibrate", "--alpha=0.0125", "--severity=critical", "--replace-manual")
	if code != exitOK || strings.Count(stdout,
		"critical does not apply: the class's thresholds of another severity decide") != 2 {
		t.Errorf("%d %s%s", code, stdout, stderr)
	}

	// The model's critical threshold set by hand stays, below what the scores say: refused, and nothing is set.
	if _, stderr, code := run("set", "--value=1", "--severity=warn"); code != exitOK {
		t.Fatal(stderr)
	}
	if _, stderr, code := run("set", "--value=2", "--severity=critical"); code != exitOK {
		t.Fatal(stderr)
	}
	before, err := store.Thresholds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, apply := range [][]string{nil, {"--apply"}} {
		_, stderr, code := run(append([]string{"calibrate", "--alpha=0.05", "--replace-manual"}, apply...)...)
		if code != exitFailed || !strings.Contains(stderr, "scope model: critical value 2 is below warn value") ||
			!strings.Contains(stderr, "nothing was changed") {
			t.Errorf("%d %s", code, stderr)
		}
	}
	after, err := store.Thresholds(t.Context())
	if err != nil || len(after) != len(before) || after[len(after)-1].ID != before[len(before)-1].ID {
		t.Errorf("%+v, want %+v: %v", after, before, err)
	}
}

package main

import (
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// A new installation gets its first thresholds from the ensemble's reference. What a change does is shown before it is
// made, with its whole scope, and taking the last threshold back warns.
func TestFirstThresholds(t *testing.T) {
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
	storeScores(t, store, e, []int{3, 0, 0, 0, 0, 0, 0, 0, 2, 0}, func(class int) float64 { return float64(100 * class) })
	inForce := func() []schema.Threshold {
		t.Helper()
		list, err := store.Thresholds(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	do := func(args ...string) string {
		t.Helper()
		out, stderr, code := verb(t, append(args, "--postgres.url", url)...)
		if code != exitOK {
			t.Fatalf("%v: %d %s", args, code, stderr)
		}
		return out
	}
	preview := do("thresholds", "from-reference", shippedEnsemble)
	applied := do("thresholds", "from-reference", shippedEnsemble, "--apply", "--by=ada")
	holds(t, preview, "class_gap of fashion-mnist, every class without thresholds of its own: warn from", "critical from",
		"Alerts of request_risk on the 5 scores of the last week: 0 with the old thresholds, 2 with the new.",
		"Nothing was changed")
	holds(t, applied, "Applied as change 1")
	if list := inForce(); len(list) < 4 || list[0].Origin != "reference" || list[0].SetBy != "ada" {
		t.Fatalf("%+v", list)
	}
	before := len(inForce())
	set := []string{"thresholds", "set", shippedEnsemble, "--measurement=request_risk", "--reason=test"}
	out := do(append(set, "--class=8", "--value=1e6", "--distance=3", "--dry-run")...)
	holds(t, out, "request_risk of fashion-mnist, class 8 Bag: warn from 1e+06, by the mean distance from 3 if saturated",
		"2 with the old thresholds, 0 with the new", "Nothing was changed")
	out = do(append(set, "--limit", "--value=1e9", "--severity=critical", "--dry-run")...)
	holds(t, out, "absolute limit of every class: critical from 1e+09")
	if n := len(inForce()); n != before {
		t.Errorf("%d thresholds after a preview, %d before", n, before)
	}
	out = do(append(set, "--class=Bag", "--value=1e6")...)
	holds(t, out, "threshold ", "class 8 Bag: warn from 1e+06", "2 with the old thresholds, 0 with the new")
	if out = do("thresholds", "rollback", "--reason=test"); strings.Contains(out, "Warning") {
		t.Errorf("thresholds are left: %s", out)
	}
	out = do("thresholds", "rollback", "--reason=test")
	holds(t, out, "Warning: no threshold is left for class_gap of fashion-mnist",
		"Warning: no threshold is left for request_risk of fashion-mnist", "thresholds from-reference")
	if list := inForce(); len(list) != 0 {
		t.Errorf("%+v", list)
	}
}

// Silences by the command line: a class by label or index, what is refused, and the end.
func TestSilencesVerb(t *testing.T) {
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
	storeScores(t, store, e, []int{0, 0, 0, 0, 0, 0, 0, 0, 1, 0}, func(int) float64 { return 1 })
	for _, c := range []struct {
		name string
		args []string
		code int
		says []string
	}{
		{"none", []string{"list"}, exitOK, []string{"There are no silences"}},
		{"by label", []string{"add", "--model=fashion-mnist", "--class=bag", "--for=2h", "--reason=known", "--by=ada"},
			exitOK, []string{"silence 1", "class 8 Bag", "measurement all", "2h0m0s"}},
		{"by index", []string{"add", "--model=fashion-mnist", "--class=3", "--for=1h", "--reason=known",
			"--measurement=class_gap"}, exitOK, []string{"silence 2", "class 3", "measurement class_gap"}},
		{"list", []string{"list"}, exitOK, []string{"8 Bag", "ada", "known", "UTC"}},
		{"lines", []string{"list", "--json"}, exitOK, []string{`{"id":2,`, "\n" + `{"id":1,`, `"in_force":true`}},
		{"unknown label", []string{"add", "--model=fashion-mnist", "--class=Hat", "--for=1h", "--reason=x"}, exitUsage,
			[]string{`"Hat"`}},
		{"no time", []string{"add", "--model=m", "--for=0s", "--reason=x"}, exitUsage, []string{"--for is 0s"}},
		{"no reason", []string{"add", "--model=m", "--for=1h", "--reason= "}, exitUsage, []string{"--reason"}},
		{"no such measurement", []string{"add", "--model=m", "--for=1h", "--reason=x", "--measurement=size"}, exitUsage,
			[]string{"class_gap"}},
		{"end", []string{"end", "1", "--by=grace"}, exitOK, []string{"silence 1 has ended"}},
		{"ended", []string{"end", "1"}, exitFailed, []string{"not found"}},
		{"past", []string{"list", "--past"}, exitOK, []string{"by grace"}},
	} {
		out, stderr, code := verb(t, append(append([]string{"silences"}, c.args...), "--postgres.url", url)...)
		if code != c.code {
			t.Errorf("%s: code %d, want %d: %s", c.name, code, c.code, stderr)
		}
		holds(t, out+stderr, c.says...)
	}
}

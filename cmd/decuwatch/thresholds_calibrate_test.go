package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/alerts/drift"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

const shippedEnsemble = "../../ensembles/fashion-mnist"

// verb runs the command line as main does and returns what it printed and its exit code.
func verb(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	code = run(ctx, args, func(string) string { return "" }, strings.NewReader(""), &out, &errs)
	return out.String(), errs.String(), code
}

// storeScores stores n scores of each class whose request risk is Gaussian around the class's mean.
func storeScores(t *testing.T, store *postgres.Store, e *ensemble.Ensemble, n []int, mean func(class int) float64) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 1))
	now := time.Now().UTC().Truncate(time.Microsecond)
	var wg sync.WaitGroup
	sequence := uint64(0)
	for class, count := range n {
		for i := range count {
			sequence++
			value := mean(class) + r.NormFloat64()
			m := schema.Measurement{Estimator: "mean-w2", Value: value, MeanDistance: math.Abs(value), Distances: [][]float64{},
				Shares: []float64{}}
			s := &schema.Score{
				Event: schema.Event{Source: "//test", ID: fmt.Sprint(sequence), Time: now.Add(-time.Duration(i) * time.Hour / 2),
					Data: schema.Generation{Model: e.Name, Class: schema.ClassIndex(class)}},
				ClassIndex: class, ClassLabel: e.Classes[class].Label, ClassGap: m, RequestRisk: &m, ScoredAt: now,
				Receipt: schema.Receipt{EnsembleDigest: e.Digest, Settings: e.Profile.Settings(), Profile: "fixed", Steps: 20,
					Runtime: "test", Device: "cpu", Noise: "torch-cpu"},
			}
			d := schema.Delivery{Stream: "GENERATION", Sequence: sequence, Delivered: 1,
				Digest: schema.Digest(nil, []byte(s.Event.ID))}
			wg.Go(func() {
				if _, err := store.Record(t.Context(), schema.Verdict{Delivery: d, Score: s}); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
}

func TestThresholdsCalibrate(t *testing.T) {
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
	calibrate := func(args ...string) (string, string, int) {
		return verb(t, append([]string{"thresholds", "calibrate", shippedEnsemble, "--measurement", "request_risk",
			"--postgres.url", url}, args...)...)
	}
	nothing := func(why string) {
		t.Helper()
		if now, err := store.Thresholds(t.Context()); err != nil || len(now) != 0 {
			t.Errorf("%s changed the thresholds: %+v %v", why, now, err)
		}
	}
	if _, stderr, code := calibrate("--alpha", "0.05"); code != exitFailed ||
		!strings.Contains(stderr, "there are no scores of model fashion-mnist") {
		t.Errorf("a window without scores: %d %s", code, stderr)
	}
	for _, alpha := range []string{"0", "1", "-0.5", "NaN"} {
		if _, stderr, code := calibrate("--alpha=" + alpha); code != exitUsage ||
			!strings.Contains(stderr, "must lie between 0 and 1") {
			t.Errorf("alpha %s: %d %s", alpha, code, stderr)
		}
	}
	if _, stderr, code := calibrate("--alpha", "0.05", "--apply"); code != exitUsage ||
		!strings.Contains(stderr, "--reason") {
		t.Errorf("no reason: %d %s", code, stderr)
	}

	// Classes 4 and 9 saw most images. Class 4 has scores enough; 0 and 1 are alike and have them together; 2 has few.
	storeScores(t, store, e, []int{12, 12, 4, 0, 40, 0, 0, 0, 0, 40}, func(class int) float64 {
		return []float64{50, 50, 90, 0, 10, 0, 0, 0, 0, 10.5}[class]
	})
	if _, stderr, code := calibrate("--alpha", "0.001"); code != exitFailed ||
		!strings.Contains(stderr, "takes 999 scores, 80 are there: 919 are missing") ||
		!strings.Contains(stderr, "nothing was changed") {
		t.Errorf("an alpha out of reach: %d %s", code, stderr)
	}
	stdout, stderr, code := calibrate("--alpha", "0.05", "--limit-alpha", "0.02")
	if code != exitOK {
		t.Fatalf("%d %s", code, stderr)
	}
	for _, want := range []string{"Nothing was changed.", "pooled with classes 0 1; 7 more scores",
		"the model's; 15 more scores", "absolute limit"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("the plan does not say %q:\n%s", want, stdout)
		}
	}
	nothing("a plan")

	stdout, stderr, code = calibrate("--alpha", "0.05", "--limit-alpha", "0.02", "--apply", "--reason", "first month",
		"--by", "ada", "--json")
	if code != exitOK {
		t.Fatalf("%d %s", code, stderr)
	}
	var plan calibration.Plan
	if err := json.Unmarshal([]byte(stdout), &plan); err != nil {
		t.Fatal(err)
	}
	if plan.Applied == 0 || plan.Scores != 108 || len(plan.Classes) != 11 || plan.AlertsOld != 0 || plan.AlertsNew == 0 {
		t.Errorf("%+v", plan)
	}
	now, err := store.Thresholds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	scopes := map[string]int{}
	for _, th := range now {
		scopes[string(th.Scope)]++
		if th.Origin != "calibrated" || th.SetBy != "ada" || th.Reason != "first month" || th.N == 0 || th.Alpha == nil ||
			th.Achieved == nil || *th.Achieved > *th.Alpha || th.WindowFrom == nil {
			t.Errorf("%+v", th)
		}
	}
	if fmt.Sprint(scopes) != "map[class:2 cluster:2 limit:1 model:1]" {
		t.Errorf("scopes %v", scopes)
	}
	// What was counted is what a live decision says: the share of class 4's scores that alert is at most alpha.
	if line := plan.Classes[5]; *line.Class != 4 || line.NewScope != schema.ScopeClass ||
		float64(line.AlertsNew) > 0.05*41 {
		t.Errorf("%+v", line)
	}

	// A class's drift is measured against the scores that calibrated the model's threshold.
	series := schema.Series{Model: e.Name, EnsembleDigest: e.Digest, Settings: e.Profile.Settings()}
	if reference, err := drift.Calibrated(t.Context(), series, e.WellSampled(), now, store); err != nil ||
		!reference.Empty() {
		t.Errorf("a threshold of the request risk is no reference of the class gap: %v", err)
	}
	if _, stderr, code := verb(t, "thresholds", "calibrate", shippedEnsemble, "--measurement", "class_gap", "--alpha",
		"0.05", "--apply", "--reason", "for drift", "--postgres.url", url); code != exitOK {
		t.Fatal(stderr)
	}
	if now, err = store.Thresholds(t.Context()); err != nil {
		t.Fatal(err)
	}
	if reference, err := drift.Calibrated(t.Context(), series, e.WellSampled(), now, store); err != nil ||
		reference.PValue(1000) != 1.0/81 {
		t.Errorf("the reference does not hold the 80 scores of the well-sampled classes: p = %g, %v", reference.PValue(1000),
			err)
	}
	if _, stderr, code := verb(t, "thresholds", "rollback", "--reason", "drift done", "--postgres.url",
		url); code != exitOK {
		t.Fatal(stderr)
	}

	// A threshold set by hand stays, unless told otherwise; an alpha that classes cannot carry any more withdraws theirs.
	if _, stderr, code := verb(t, "thresholds", "set", shippedEnsemble, "--measurement", "request_risk", "--class", "4",
		"--value", "12", "--reason", "incident", "--postgres.url", url); code != exitOK {
		t.Fatal(stderr)
	}
	stdout, _, code = calibrate("--alpha", "0.02", "--apply", "--reason", "stricter")
	if code != exitOK || !strings.Contains(stdout, "set by hand, stays") {
		t.Errorf("%d %s", code, stdout)
	}
	now, err = store.Thresholds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	scopes = map[string]int{}
	for _, th := range now {
		scopes[string(th.Scope)+" "+th.Origin]++
	}
	// Classes 4 and 9 differ by half a deviation and are one cluster or none: 80 scores of the pool carry the model's.
	if scopes["class manual"] != 1 || scopes["class calibrated"] != 0 || scopes["model calibrated"] != 1 ||
		scopes["limit calibrated"] != 1 {
		t.Errorf("scopes %v", scopes)
	}

	for range 3 {
		if _, stderr, code := verb(t, "thresholds", "rollback", "--reason", "all of it", "--postgres.url",
			url); code != exitOK {
			t.Fatal(stderr)
		}
	}
	nothing("after all rollbacks, what was set")
	if _, stderr, code := verb(t, "thresholds", "rollback", "--reason", "more", "--postgres.url",
		url); code != exitFailed || !strings.Contains(stderr, "not found") {
		t.Errorf("a rollback of nothing: %d %s", code, stderr)
	}
	stdout, _, code = verb(t, "thresholds", "history", "--postgres.url", url)
	if code != exitOK || strings.Count(stdout, "rollback of") != 4 || !strings.Contains(stdout, "first month") {
		t.Errorf("%d %s", code, stdout)
	}
}

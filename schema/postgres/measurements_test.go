package postgres_test

import (
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// fullScore returns a score with every measurement.
func fullScore(id string, value float64) *schema.Score {
	s := score(id, value, value)
	for _, m := range []*schema.Measurement{&s.ClassGap, s.RequestRisk} {
		m.Tables, m.Guidance, m.Steps = "posterior", "shared", 3
	}
	s.ImageRisk = &schema.Measurement{
		Estimator: "judge", Value: value, UpperBound: 1, BranchStep: 0, RolloutSteps: 3, Tables: "producer",
		Guidance: "own", Steps: 4, Top: []schema.ClassProbability{
			{Class: 1, Probability: 1 - value}, {Class: 0, Probability: value / 3}, {Class: 4, Probability: value / 7},
		},
	}
	s.Receipt.ClassImages, s.Receipt.ClassNEff, s.Receipt.ClassDraws = 1000, 12.3, 4000
	return s
}

// Every measurement that a score can have is stored and read back, has columns in the tables and views, and can have
// thresholds and alerts. This sweeps the list, so that a new measurement cannot be left out anywhere.
func TestEveryMeasurementIsStored(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	v := schema.Verdict{Score: fullScore("one", 0.1+0.2), Delivery: delivery(1, "one")}
	for _, name := range schema.MeasurementNames() {
		a := alert(v.Score, "alert-"+string(name))
		a.Measurement, a.ImageRisk = name, &v.Score.ImageRisk.Value
		v.Alerts = append(v.Alerts, a)
	}
	mustRecord(t, s, v)
	got, err := s.ScoreByID(ctx, v.Score.Event.Identity())
	if err != nil || !reflect.DeepEqual(got, v.Score) {
		t.Errorf("stored\n%+v, read\n%+v\n%v", v.Score, got, err)
	}
	from := v.Score.Event.Time.Add(-time.Hour)
	for i, name := range schema.MeasurementNames() {
		m := v.Score.Measurements()[i]
		if m.Name != name {
			t.Fatalf("measurement %d is %s, want %s", i, m.Name, name)
		}
		want := schema.Sample{
			Class: 1, Value: m.Value, Distance: m.MeanDistance, Saturated: m.Saturated, Weight: 1,
		}
		if got, err := s.Samples(ctx, got.Series(), name, from, at.Add(time.Hour)); err != nil || len(got) != 1 ||
			got[0] != want {
			t.Errorf("samples of %s are %+v, want %+v: %v", name, got, want, err)
		}
		if got, err := s.ScoreValues(ctx, got.Series(), name, nil, from, 9); err != nil || len(got) != 1 ||
			got[0] != m.Value {
			t.Errorf("values of %s are %v: %v", name, got, err)
		}
		if got, n, err := s.Tail(ctx, got.Series(), name, []int{1}, from, 0.5); err != nil || n != 1 || got != m.Value {
			t.Errorf("the tail of %s is %v of %d: %v", name, got, n, err)
		}
		th := threshold(0.2)
		th.Measurement = name
		if _, err := s.SetThreshold(ctx, th); err != nil {
			t.Errorf("threshold of %s: %v", name, err)
		}
		if a, err := s.AlertByID(ctx, "alert-"+string(name)); err != nil || a.Measurement != name || a.ImageRisk == nil ||
			*a.ImageRisk != v.Score.ImageRisk.Value {
			t.Errorf("alert of %s is %+v: %v", name, a, err)
		}
		for _, view := range []string{"class_risk_hourly", "class_risk_daily"} {
			if n := count(t, conn, fmt.Sprintf(`SELECT count(*) FROM decuwatch_views.%s WHERE n = 1
				AND (%[2]s_mean, %[2]s_min, %[2]s_max) = ($1, $1, $1) AND %[2]s_sd IS NULL`, view, name), m.Value); n != 1 {
				t.Errorf("%s has %d rows with %s", view, n, name)
			}
		}
		for _, view := range []string{"scores", "production_scores", "alerts", "production_alerts"} {
			if n := count(t, conn, fmt.Sprintf(`SELECT count(*) FROM decuwatch_views.%s WHERE %s > 0`, view, name)); n == 0 {
				t.Errorf("%s does not show %s", view, name)
			}
		}
	}
	top := list(t, conn, `SELECT image_risk_top ->> 0 FROM decuwatch_views.scores`)
	if !strings.Contains(top[0], `"class": 1`) {
		t.Errorf("the judge's verdict is shown as %s", top)
	}
	for name, err := range map[string]error{
		"samples": func() error { _, err := s.Samples(ctx, got.Series(), "x", from, at); return err }(),
		"values":  func() error { _, err := s.ScoreValues(ctx, got.Series(), "x", nil, from, 9); return err }(),
		"tail":    func() error { _, _, err := s.Tail(ctx, got.Series(), "x", nil, from, 0.5); return err }(),
	} {
		if err == nil || !strings.Contains(err.Error(), "class_gap, request_risk, image_risk") {
			t.Errorf("%s of an unknown measurement: %v", name, err)
		}
	}
}

// What was not measured is NULL with its reason, and no statistic counts it, also after the rollups are folded.
func TestUnmeasuredIsNull(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	scores := []*schema.Score{fullScore("a", 0.25), fullScore("b", 0.75), fullScore("c", 0), fullScore("d", 0),
		fullScore("e", 0), fullScore("f", 0)}
	for i, reason := range []schema.UnmeasuredReason{schema.NoJudge, schema.JudgeCannotTell, schema.NotFinite, ""} {
		scores[2+i].ImageRisk, scores[2+i].ImageRiskReason = nil, reason
	}
	for i, x := range scores {
		v := schema.Verdict{Score: x, Delivery: delivery(uint64(i), x.Event.ID)}
		if x.ImageRisk == nil {
			v.Alerts = []schema.Alert{alert(x, "alert-"+x.Event.ID)}
		}
		mustRecord(t, s, v)
		if got, err := s.ScoreByID(ctx, x.Event.Identity()); err != nil || !reflect.DeepEqual(got, x) {
			t.Errorf("stored\n%+v, read\n%+v\n%v", x, got, err)
		}
	}
	check := func(when string) {
		t.Helper()
		for _, view := range []string{"class_risk_hourly", "class_risk_daily"} {
			if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.`+view+` WHERE n = 6 AND image_risk_n = 2
				AND image_risk_mean = 0.5 AND image_risk_min = 0.25 AND image_risk_max = 0.75
				AND abs(image_risk_sd - 0.35355339) < 1e-6 AND class_gap_max = 0.75 AND class_gap_min = 0`); n != 1 {
				t.Errorf("%s: %s has %d such rows", when, view, n)
			}
		}
	}
	check("as written")
	if n := count(t, conn, `SELECT decuwatch.fold()::int`); n != 1 {
		t.Fatal("not folded")
	}
	check("folded")
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.class_hour_parts`); n != 1 {
		t.Errorf("%d rows after folding", n)
	}
	samples, err := s.Samples(ctx, scores[0].Series(), schema.ImageRisk, at.Add(-time.Hour), at.Add(time.Hour))
	if err != nil || len(samples) != 2 {
		t.Errorf("%d samples of the image risk, want 2: %v", len(samples), err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.alerts WHERE image_risk IS NULL`); n != 4 {
		t.Errorf("%d alerts without an image risk, want 4", n)
	}
	if got := list(t, conn, `SELECT coalesce(image_risk_reason, '-') FROM decuwatch_views.scores WHERE image_risk IS NULL
		ORDER BY event_id`); !reflect.DeepEqual(got, []string{"no_judge", "judge_cannot_tell", "not_finite", "-"}) {
		t.Errorf("reasons %v", got)
	}
}

// A request risk that a cascade spared is NULL with its reason and its probability, and no statistic counts it, also
// after the rollups are folded.
func TestSparedRequestRiskIsNull(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	var scores []*schema.Score
	for i, value := range []float64{0.25, 0.75, 0, 0} {
		x := fullScore(string(rune('a'+i)), value)
		if value == 0 {
			x.RequestRisk, x.RequestRiskReason, x.RequestRiskProbability = nil, schema.BelowCut, 0.05*float64(i%2)
		}
		scores = append(scores, x)
	}
	scores[0].RequestRiskProbability = 0.05
	for i, x := range scores {
		a := alert(x, "alert-"+x.Event.ID)
		a.Measurement = schema.ClassGap
		mustRecord(t, s, schema.Verdict{Score: x, Delivery: delivery(uint64(i), x.Event.ID), Alerts: []schema.Alert{a}})
		if got, err := s.ScoreByID(ctx, x.Event.Identity()); err != nil || !reflect.DeepEqual(got, x) {
			t.Errorf("stored\n%+v, read\n%+v\n%v", x, got, err)
		}
		if got, err := s.AlertByID(ctx, a.ID); err != nil || (got.RequestRisk == nil) != (x.RequestRisk == nil) {
			t.Errorf("%s: the alert has the request risk %v: %v", x.Event.ID, got.RequestRisk, err)
		}
	}
	check := func(when string) {
		t.Helper()
		for _, view := range []string{"class_risk_hourly", "class_risk_daily"} {
			if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.`+view+` WHERE n = 4 AND request_risk_n = 2
				AND request_risk_min = 0.25 AND request_risk_max = 0.75
				AND image_risk_n = 4 AND class_gap_max = 0.75 AND class_gap_min = 0`); n != 1 {
				t.Errorf("%s: %s has %d such rows", when, view, n)
			}
		}
	}
	check("as written")
	if n := count(t, conn, `SELECT decuwatch.fold()::int`); n != 1 {
		t.Fatal("not folded")
	}
	check("folded")
	samples, err := s.Samples(ctx, scores[0].Series(), schema.RequestRisk, at.Add(-time.Hour), at.Add(time.Hour))
	if err != nil || len(samples) != 2 {
		t.Errorf("%d samples of the request risk, want 2: %v", len(samples), err)
	}
	if got := list(t, conn, `SELECT coalesce(request_risk_reason, '-') || ' ' || request_risk_probability
		FROM decuwatch_views.production_scores ORDER BY event_id`); !reflect.DeepEqual(got,
		[]string{"- 0.05", "- 1", "below_cut 0", "below_cut 0.05"}) {
		t.Errorf("reasons and probabilities %v", got)
	}
}

// Numbers that no image risk or request risk can have are refused, by the program or by the table.
func TestImpossibleMeasurementIsRefused(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	for i, change := range []func(*schema.Score){
		func(s *schema.Score) { s.ImageRisk.Value = math.NaN() },
		func(s *schema.Score) { s.ImageRisk.Value = math.Inf(1) },
		func(s *schema.Score) { s.ImageRisk.Value = 1.5 },
		func(s *schema.Score) { s.ImageRisk.Value = -0.1 },
		func(s *schema.Score) { s.ImageRisk.Top[1].Probability = math.NaN() },
		func(s *schema.Score) { s.ImageRiskReason = schema.NoJudge },
		func(s *schema.Score) { s.ImageRisk, s.ImageRiskReason = nil, "tired" },
		func(s *schema.Score) { s.Receipt.ClassNEff = math.Inf(1) },
		func(s *schema.Score) { s.RequestRisk = nil },
		func(s *schema.Score) { s.RequestRisk, s.RequestRiskReason = nil, "tired" },
		func(s *schema.Score) { s.RequestRiskReason = schema.BelowCut },
		func(s *schema.Score) { s.RequestRiskProbability = 1.1 },
		func(s *schema.Score) { s.RequestRiskProbability = -0.1 },
		func(s *schema.Score) { s.RequestRiskProbability = math.NaN() },
	} {
		x := fullScore("one", 0.5)
		change(x)
		if _, err := s.Record(testContext(t), schema.Verdict{Score: x, Delivery: delivery(1, "one")}); err == nil {
			t.Errorf("score %d was stored", i)
		}
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.events`); n != 0 {
		t.Errorf("%d events have a verdict", n)
	}
}

// What a manifest says about its classes is written once, and what it does not say is NULL.
func TestClassData(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	draws, gap, n, share := 4000, 0.0123, 12.5, 0.91
	classes := []postgres.ClassData{
		{Model: "m", EnsembleDigest: ensembleDigest, ClassIndex: 0, ClassLabel: "Bag", Draws: &draws, ClassGap: &gap,
			Images: &draws, DistinctImages: &draws, NEff: &n, NearDuplicates: &draws, NearDuplicateGroups: &draws,
			NeighborLabelShare: &share, LikelyMislabeled: &draws, Outliers: &draws, JudgeAccuracy: &share,
			JudgeHeldOut: &draws},
		{Model: "m", EnsembleDigest: ensembleDigest, ClassIndex: 2, ClassLabel: "Coat", Draws: &draws},
	}
	for range 2 { // the next start writes them again
		if err := s.AddClassData(ctx, classes); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.AddClassData(ctx, nil); err != nil {
		t.Error(err)
	}
	got, err := s.ClassData(ctx, "m", ensembleDigest, []int{0, 1, 2})
	if want := map[int]postgres.ClassData{0: classes[0], 2: classes[1]}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v, want %+v: %v", got, want, err)
	}
	if got, err := s.ClassData(ctx, "other", ensembleDigest, []int{0}); err != nil || len(got) != 0 {
		t.Errorf("another model has %+v: %v", got, err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.class_data WHERE class_label = 'Bag' AND n_eff = 12.5
		AND likely_mislabeled = 4000 AND judge_accuracy = 0.91`); n != 1 {
		t.Errorf("the view has %d such rows", n)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.class_data WHERE class_label = 'Coat'
		AND images IS NULL AND n_eff IS NULL AND class_gap IS NULL AND judge_accuracy IS NULL`); n != 1 {
		t.Errorf("the view has %d such rows", n)
	}
}

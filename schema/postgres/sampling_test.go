package postgres_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// A score's probability is stored and read back, in views and samples too. One that cannot be is refused.
func TestInclusionProbabilities(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	v := scoreVerdict(1, "one")
	v.Score.InclusionProbability = 0.1
	mustRecord(t, s, v)
	got, err := s.ScoreByID(ctx, v.Score.Event.Identity())
	if err != nil || !reflect.DeepEqual(got, v.Score) {
		t.Errorf("stored\n%+v, read\n%+v\n%v", v.Score, got, err)
	}
	for _, view := range []string{"scores", "production_scores"} {
		if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.`+view+` WHERE inclusion_probability = 0.1`); n != 1 {
			t.Errorf("%s does not show the probability", view)
		}
	}
	for _, name := range schema.MeasurementNames()[:2] {
		samples, err := s.Samples(ctx, got.Series(), name, at.Add(-time.Hour), at.Add(time.Hour))
		if err != nil || len(samples) != 1 || samples[0].Weight != 10 {
			t.Errorf("samples of %s: %+v, %v", name, samples, err)
		}
	}
	p := 0.25
	skip := schema.Verdict{Delivery: delivery(2, "two"), Skip: &schema.Skip{
		Event: event("two"), Reason: schema.SkipSampledOut, Detail: "by lot", InclusionProbability: &p,
	}}
	mustRecord(t, s, skip)
	if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.skips WHERE inclusion_probability = 0.25`); n != 1 {
		t.Error("the skip has no probability")
	}
	for i, p := range []float64{-0.1, 1.5, math.NaN(), math.Inf(1), 2} {
		v := scoreVerdict(uint64(10+i), fmt.Sprint("bad ", i))
		v.Score.InclusionProbability = p
		if _, err := s.Record(ctx, v); err == nil || !postgres.Refused(err) {
			t.Errorf("a score with probability %g: %v", p, err)
		}
		skip := schema.Verdict{Delivery: delivery(uint64(20+i), fmt.Sprint("bad skip ", i)), Skip: &schema.Skip{
			Event: event(fmt.Sprint("bad skip ", i)), Reason: schema.SkipSampledOut, InclusionProbability: &p,
		}}
		if _, err := s.Record(ctx, skip); err == nil {
			t.Errorf("a skip with probability %g was taken", p)
		}
	}
	for _, skip := range []schema.Skip{
		{Event: event("x"), Reason: schema.SkipSampledOut},
		{Event: event("x"), Reason: schema.SkipBudget, InclusionProbability: &p},
	} {
		if _, err := s.Record(ctx, schema.Verdict{Delivery: delivery(30, "x"), Skip: &skip}); err == nil {
			t.Errorf("a skip %s with probability %v was taken", skip.Reason, skip.InclusionProbability)
		}
	}
	if v.Score.InclusionProbability = math.NaN(); !errors.Is(func() error {
		v.Delivery, v.Score.Event.ID = delivery(40, "nan"), "nan"
		_, err := s.Record(ctx, v)
		return err
	}(), postgres.ErrNotFinite) {
		t.Error("NaN is taken for a probability")
	}
}

// Over draws, what the rollup views estimate is right in the mean, and their standard errors say how far off one
// estimate is: also after the rollups were folded. Each draw is a model of its own.
func TestViewsEstimateTraffic(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	r := rand.New(rand.NewPCG(5, 6))
	const draws, traffic = 40, 60
	type request struct {
		gap, risk, p float64
		riskP        float64 // probability with which the request risk is measured, as in a cascade
		critical     bool
	}
	var all []request
	var meanGap, meanRisk, criticals float64
	for i := range traffic {
		q := request{gap: r.ExpFloat64(), p: []float64{1, 0.5, 0.2}[i%3], riskP: []float64{1, 0.6}[i%2], critical: i%4 == 0}
		q.gap += float64(i % 3) // the more, the less often it is scored
		q.risk = q.gap * q.gap
		all = append(all, q)
		meanGap += q.gap / traffic
		meanRisk += q.risk / traffic
		if q.critical {
			criticals++
		}
	}
	n := uint64(0)
	for draw := range draws {
		for i, q := range all {
			if r.Float64() >= q.p {
				continue
			}
			n++
			v := scoreVerdict(n, fmt.Sprint(draw, " ", i))
			v.Score.Event.Data.Model = fmt.Sprint("draw-", draw)
			v.Score.ClassGap.Value, v.Score.RequestRisk.Value = q.gap, q.risk
			v.Score.InclusionProbability, v.Score.RequestRiskProbability = q.p, q.riskP
			if r.Float64() >= q.riskP {
				v.Score.RequestRisk, v.Score.RequestRiskReason = nil, schema.BelowCut
			}
			if q.critical {
				a := alert(v.Score, fmt.Sprint("alert ", n))
				a.Severity = schema.SeverityCritical
				v.Alerts = []schema.Alert{a}
			}
			mustRecord(t, s, v)
		}
	}
	for _, folded := range []bool{false, true} {
		if folded {
			if err := s.Fold(testContext(t)); err != nil {
				t.Fatal(err)
			}
		}
		for _, view := range []string{"class_risk_hourly", "class_risk_daily"} {
			for estimate, c := range map[string]struct {
				truth float64
				se    string
			}{
				"requests": {traffic, "requests_se"}, "criticals_estimated": {criticals, "criticals_se"},
				"class_gap_mean": {meanGap, "class_gap_mean_se"}, "request_risk_mean": {meanRisk, "request_risk_mean_se"},
			} {
				var mean, spread, variance float64
				var rows int
				if err := conn.QueryRow(testContext(t), fmt.Sprintf(`SELECT count(*), avg(%[1]s), var_samp(%[1]s), avg(%[2]s ^ 2)
					FROM decuwatch_views.%[3]s`, estimate, c.se, view)).Scan(&rows, &mean, &spread, &variance); err != nil {
					t.Fatal(err)
				}
				if z := (mean - c.truth) / math.Sqrt(spread/draws); rows != draws || math.Abs(z) > 4 {
					t.Errorf("%s, folded %t: %s is %.3f in the mean of %d, true is %.3f: z = %.1f", view, folded, estimate, mean,
						rows, c.truth, z)
				}
				if ratio := variance / spread; ratio < 0.5 || ratio > 2 { // 40 draws tell the variance to about a quarter
					t.Errorf("%s, folded %t: %s varies by %.3f, its standard error says %.3f", view, folded, estimate,
						math.Sqrt(spread), math.Sqrt(variance))
				}
			}
		}
	}
	if got := count(t, conn, `SELECT sum(n) FROM decuwatch_views.class_risk_hourly`); got != int(n) {
		t.Errorf("%d scores are counted, %d are there", got, n)
	}
	// Tails and distances are weighed, too: a value that is scored one time in five counts five times.
	weighed := func(i int, value, p float64) {
		v := scoreVerdict(uint64(1e6+i), fmt.Sprint("tail ", i))
		v.Score.ClassGap.Value, v.Score.ClassGap.MeanDistance, v.Score.InclusionProbability = value, value, p
		mustRecord(t, s, v)
	}
	for i := range 5 {
		weighed(i, 1, 1)
	}
	weighed(6, 9, 0.2)
	of := scoreVerdict(1, "x").Score.Series()
	got, scores, err := s.Tail(testContext(t), of, schema.ClassGap, []int{1}, at.Add(-time.Hour), 0.4)
	if err != nil || got != 9 || scores != 6 {
		t.Errorf("two of five requests reach %g, of %d scores: %v", got, scores, err)
	}
	d, err := s.ClassGapDistances(testContext(t), of, []int{1}, at.Add(-time.Hour), 50)
	if err != nil || len(d) != 1 || d[0].Distance != 5 || d[0].N != 6 {
		t.Errorf("distances %+v: %v", d, err)
	}
}

// Precision, misses and recall are about the traffic: what a reviewer found counts for the requests that it stands for.
func TestTallyIsWeighed(t *testing.T) {
	s, _ := open(t, postgres.Config{})
	ctx := testContext(t)
	for i, c := range []struct {
		id    string
		p     float64
		alert bool
	}{{"a", 0.5, true}, {"b", 1, true}, {"c", 0.2, true}, {"d", 0.25, false}, {"e", 1, false}, {"f", 0.1, false}} {
		v := scoreVerdict(uint64(i+1), c.id)
		v.Score.InclusionProbability = c.p
		if c.alert {
			v.Alerts = []schema.Alert{alert(v.Score, "alert "+c.id), alert(v.Score, "another alert "+c.id)}
		}
		v.Sampled = !c.alert
		mustRecord(t, s, v)
	}
	reviews, err := s.Reviews(ctx, postgres.ReviewFilter{Limit: 10})
	if err != nil || len(reviews) != 6 {
		t.Fatalf("%d reviews: %v", len(reviews), err)
	}
	verdicts := map[string]schema.ReviewVerdict{
		"a": schema.VerdictConfirmed, "b": schema.VerdictFalseAlarm, "d": schema.VerdictExpected,
		"e": schema.VerdictFalseAlarm,
	}
	for _, r := range reviews {
		if verdict := verdicts[r.EventID]; verdict != "" {
			now := time.Now().UTC().Truncate(time.Microsecond)
			r.State, r.Verdict, r.ResolvedAt = schema.ReviewResolved, verdict, &now
			change := postgres.ReviewChange{Review: r, Action: "resolve", Actor: "x", At: now}
			if _, err := s.ChangeReview(ctx, change); err != nil {
				t.Fatal(err)
			}
		}
	}
	hour := at.Truncate(time.Hour)
	got, err := s.TallyReviews(ctx, "", nil, hour, hour.Add(time.Hour))
	want := postgres.ReviewTally{
		Scored: 6, Alerted: 3, AlertsConfirmed: 1, AlertsFalse: 1, AlertsOpen: 1, EventsTrue: 1, EventsFalse: 1,
		Sampled: 3, SamplesTrue: 1, SamplesFalse: 1,
		Requests: 2 + 1 + 5 + 4 + 1 + 10, RequestsAlerted: 2 + 1 + 5,
		EventsShare: 2.0 / 3, EventsWorth: 9.0 / 5, SamplesShare: 4.0 / 5, SamplesWorth: 25.0 / 17,
	}
	if err != nil || got != want {
		t.Errorf("%+v, want %+v: %v", got, want, err)
	}
}

package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

const (
	answersDigest   = "2222222222222222222222222222222222222222222222222222222222222222"
	answersSettings = "ddim s=20"
	answersModel    = "fashion-mnist"
	answersSource   = "//studio/render-2"
)

// answersLabels are the classes of the requests, as the shipped ensemble calls them.
var answersLabels = map[int]string{8: "Bag", 4: "Coat", 9: "Ankle boot"}

// request is one event of the database of TestAnswers.
type request struct {
	schema.Score
	age    time.Duration
	canary bool
	alerts []schema.Alert
	review string // state of its review, or "" if it has none
}

func (r request) tenant() any {
	if t, ok := r.Event.Data.Labels["tenant"]; ok {
		return t
	}
	return nil
}

// installation is what TestAnswers wrote, through the store, and answers questions from.
type installation struct {
	now      time.Time
	requests []request
	skips    []schema.Skip
	dead     []schema.DeadLetter
	verdicts map[string]schema.ReviewVerdict // of resolved reviews, by event
	resolved time.Time
}

// row is a row of a result, with numbers as they are compared.
type row map[string]any

const day = 24 * time.Hour

// newInstallation fills a database through the store with requests of 36 days.
func newInstallation(t *testing.T, store *postgres.Store) *installation {
	t.Helper()
	now, err := store.Now(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	in := &installation{now: now}
	for i := range 360 {
		in.add(t, store, in.request(i), uint64(i+1))
	}
	for i := range 5 {
		ev := in.event("skip-"+strconv.Itoa(i), time.Duration(i+1)*day-6*time.Hour)
		skip := schema.Skip{Event: ev, Reason: schema.SkipNoise, Detail: "generator is not known"}
		in.skips = append(in.skips, skip)
		record(t, store, schema.Verdict{Skip: &skip, Delivery: message(uint64(1000 + i))})
	}
	for i := range 7 {
		dead := schema.DeadLetter{Source: "//studio/render-" + strconv.Itoa(6+i%2), EventID: "dead-" + strconv.Itoa(i),
			Subject: schema.SubjectGeneration(answersModel), Payload: []byte("{}"), Field: "data.seed", Reason: "is missing",
			Kind: schema.KindInvalid}
		in.dead = append(in.dead, dead)
		record(t, store, schema.Verdict{DeadLetter: &dead, Delivery: message(uint64(2000 + i))})
	}
	in.review(t, store)
	in.settings(t, store)
	return in
}

func record(t *testing.T, store *postgres.Store, v schema.Verdict) {
	t.Helper()
	if _, err := store.Record(t.Context(), v); err != nil {
		t.Fatal(err)
	}
}

func message(sequence uint64) schema.Delivery {
	return schema.Delivery{Stream: "GENERATION", Sequence: sequence, Delivered: 1,
		Digest: schema.Digest(nil, []byte(strconv.FormatUint(sequence, 10)))}
}

func (in *installation) event(id string, age time.Duration) schema.Event {
	return schema.Event{Source: answersSource, ID: id, Time: in.now.Add(-age).UTC().Truncate(time.Microsecond),
		Data: schema.Generation{Model: answersModel, Class: schema.ClassIndex(8), Labels: map[string]string{}}}
}

// request returns the i-th request. Ages keep hours away from the windows that queries ask for.
func (in *installation) request(i int) request {
	classes := []int{8, 4, 9}
	class := classes[i%3]
	age := time.Duration(i%36)*day + 12*time.Hour + time.Duration(i%5-2)*time.Hour
	gap := 0.01 + 0.001*float64(i*37%100)
	if class == 8 && age < 7*day {
		gap *= 2
	}
	ev := in.event(fmt.Sprintf("event-%d", i), age)
	if i%4 > 0 {
		ev.Data.Labels["tenant"] = "tenant-" + strconv.Itoa(i%4)
	}
	device := []string{"cpu", "cuda"}[i%2]
	s := schema.Score{Event: ev, ClassIndex: class, ClassLabel: answersLabels[class],
		ClassGap: measured("paide-w2", gap, i), RequestRiskProbability: 1, ScoredAt: ev.Time.Add(time.Second),
		Receipt: schema.Receipt{EnsembleDigest: answersDigest, Profile: "fixed", Settings: answersSettings, Steps: 20,
			Noise: "torch-cpu", Rows: 20 + i%3, Runtime: "onnxruntime", Device: device}}
	if i%11 == 0 {
		s.RequestRiskReason = schema.BelowCut
	} else {
		if i%7 == 0 {
			s.RequestRiskProbability = 0.05
		}
		m := measured("mean-w2", 0.02+0.0001*float64(i*7919%1000), i)
		s.RequestRisk = &m
	}
	if class == 4 {
		s.ImageRiskReason = schema.JudgeCannotTell
	} else {
		m := schema.Measurement{Estimator: "judge", Value: float64(i%10) / 10, UpperBound: 1}
		s.ImageRisk = &m
	}
	r := request{Score: s, age: age, canary: i%29 == 0}
	for _, m := range s.Measurements() {
		severity := map[bool]schema.Severity{true: schema.SeverityCritical, false: schema.SeverityWarn}[m.Value > 0.105]
		if m.Name != schema.ImageRisk && m.Value > 0.09 {
			r.alerts = append(r.alerts, in.alert(s, m, severity))
		}
	}
	return r
}

func measured(estimator string, value float64, i int) schema.Measurement {
	third := float64(i%3+1) / 10
	return schema.Measurement{Estimator: estimator, Value: value, MeanDistance: value,
		Distances: [][]float64{{0, value, value}, {value, 0, value}, {value, value, 0}},
		Shares:    []float64{third, 0.5, 0.5 - third}, Tables: "members", Guidance: "own", Steps: 20}
}

func (in *installation) alert(s schema.Score, m schema.NamedMeasurement, severity schema.Severity) schema.Alert {
	a := schema.Alert{ID: schema.ID(s.Event.ID, string(m.Name)), Kind: schema.AlertScore, Source: s.Event.Source,
		EventID: s.Event.ID, EventTime: s.Event.Time, Model: answersModel, ClassIndex: s.ClassIndex,
		ClassLabel: s.ClassLabel, Labels: s.Event.Data.Labels, Severity: severity, Reason: schema.ReasonModel,
		Measurement: m.Name, Value: m.Value, Decided: m.Value, Threshold: 0.09, ThresholdID: 1,
		ClassGap: s.ClassGap.Value, Receipt: s.Receipt, FiredAt: s.ScoredAt.Truncate(time.Microsecond)}
	if s.RequestRisk != nil {
		a.RequestRisk = &s.RequestRisk.Value
	}
	return a
}

// add records a request. Canaries are known before their verdict, and raise alerts without a review.
func (in *installation) add(t *testing.T, store *postgres.Store, r request, sequence uint64) {
	t.Helper()
	if r.canary {
		c := postgres.Canary{Source: r.Event.Source, EventID: r.Event.ID, Model: answersModel, ClassIndex: r.ClassIndex,
			ClassLabel: r.ClassLabel, DueAt: in.now}
		outcome := postgres.CanaryMissed
		if len(r.alerts) > 0 {
			outcome = postgres.CanaryCaught
		}
		if err := store.AddCanary(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if _, err := store.CloseCanary(t.Context(), c.Source, c.EventID, outcome); err != nil {
			t.Fatal(err)
		}
	} else if len(r.alerts) > 0 {
		r.review = "open"
	}
	record(t, store, schema.Verdict{Score: &r.Score, Alerts: r.alerts, Delivery: message(sequence)})
	in.requests = append(in.requests, r)
}

// review resolves every second review, with verdicts in turn.
func (in *installation) review(t *testing.T, store *postgres.Store) {
	t.Helper()
	list, err := store.Reviews(t.Context(), postgres.ReviewFilter{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	in.resolved = in.now.Truncate(time.Microsecond)
	verdicts := schema.ReviewVerdicts()
	in.verdicts = map[string]schema.ReviewVerdict{}
	for i, r := range list {
		if i%2 == 0 {
			continue
		}
		r.State, r.Verdict, r.ResolvedAt = schema.ReviewResolved, verdicts[i/2%3], &in.resolved
		if _, err := store.ChangeReview(t.Context(), postgres.ReviewChange{
			Review: r, Action: "resolve", Actor: "tester", At: in.resolved,
		}); err != nil {
			t.Fatal(err)
		}
		in.verdicts[r.EventID] = r.Verdict
	}
}

// settings sets thresholds, and what is known of the classes' data.
func (in *installation) settings(t *testing.T, store *postgres.Store) {
	t.Helper()
	alpha := 0.01
	for _, severity := range schema.Severities() {
		if _, err := store.SetThreshold(t.Context(), schema.Threshold{Model: answersModel, EnsembleDigest: answersDigest,
			Settings: answersSettings, Measurement: schema.ClassGap, Scope: schema.ScopeModel, Severity: severity, Value: 0.09,
			Origin: "manual", N: 100, Alpha: &alpha, Achieved: &alpha, SetBy: "tester", Reason: "test"}); err != nil {
			t.Fatal(err)
		}
	}
	var classes []postgres.ClassData
	for i, label := range answersLabels {
		classes = append(classes, postgres.ClassData{Model: answersModel, EnsembleDigest: answersDigest, ClassIndex: i,
			ClassLabel: label, Images: new(100 * i), NEff: new(float64(i) / 2), LikelyMislabeled: new(i),
			JudgeAccuracy: new(0.5)})
	}
	if err := store.AddClassData(t.Context(), classes); err != nil {
		t.Fatal(err)
	}
}

// production returns the requests that are younger, canaries left out.
func (in *installation) production(age time.Duration) []request {
	return slices.DeleteFunc(slices.Clone(in.requests), func(r request) bool { return r.canary || r.age >= age })
}

// by groups requests.
func by[K comparable](list []request, key func(request) K) map[K][]request {
	groups := map[K][]request{}
	for _, r := range list {
		groups[key(r)] = append(groups[key(r)], r)
	}
	return groups
}

func label(r request) string { return r.ClassLabel }

// moments returns the mean and the variance of the class gaps of requests.
func moments(list []request) (mean, variance float64) {
	for _, r := range list {
		mean += r.ClassGap.Value / float64(len(list))
	}
	for _, r := range list {
		variance += (r.ClassGap.Value - mean) * (r.ClassGap.Value - mean) / float64(len(list))
	}
	return mean, variance
}

func count(list []request, of func(request) int) (n int) {
	for _, r := range list {
		n += of(r)
	}
	return n
}

func round(x float64, digits int) float64 {
	scale := math.Pow10(digits)
	return math.Round(x*scale) / scale
}

// answers are the answers to the questions of docs/sql.md, computed from what was written.
var answers = map[string]func(*installation) []row{
	"Which classes became riskier this week?": func(in *installation) (rows []row) {
		for class, list := range by(in.production(14*day), label) {
			now := slices.DeleteFunc(slices.Clone(list), func(r request) bool { return r.age >= 7*day })
			before := slices.DeleteFunc(slices.Clone(list), func(r request) bool { return r.age < 7*day })
			a, va := moments(now)
			b, vb := moments(before)
			rows = append(rows, row{"class_label": class, "before_n": len(before), "now_n": len(now), "before": b, "now": a,
				"ratio": a / b, "standard_errors": (a - b) / math.Sqrt(va/float64(len(now))+vb/float64(len(before)))})
		}
		return rows
	},
	"Which classes does the ensemble know least?": func(in *installation) (rows []row) {
		all := in.production(30 * day)
		for class, list := range by(all, label) {
			mean, _ := moments(list)
			worst := 0.0
			for _, r := range list {
				worst = max(worst, r.ClassGap.Value)
			}
			rows = append(rows, row{"class_label": class, "requests": len(list), "mean_gap": mean, "worst": worst,
				"percent_of_requests": round(100*float64(len(list))/float64(len(all)), 1)})
		}
		return rows
	},
	"Which tenant sends the risky requests?": func(in *installation) (rows []row) {
		bags := slices.DeleteFunc(in.production(7*day), func(r request) bool { return r.ClassLabel != "Bag" })
		for tenant, list := range by(bags, request.tenant) {
			sum, n, worst := 0.0, 0.0, 0.0
			for _, r := range list {
				if r.RequestRisk != nil {
					weight := 1 / r.RequestRiskProbability
					sum, n, worst = sum+r.RequestRisk.Value*weight, n+weight, max(worst, r.RequestRisk.Value)
				}
			}
			alerted := count(list, func(r request) int { return min(1, len(r.alerts)) })
			rows = append(rows, row{"tenant": tenant, "requests": len(list), "with_alert": alerted, "mean_risk": sum / n,
				"worst": worst})
		}
		return rows
	},
	"What would alpha = 0.5% have alerted on?": func(in *installation) (rows []row) {
		bags := slices.DeleteFunc(in.production(30*day), func(r request) bool {
			return r.ClassLabel != "Bag" || r.RequestRisk == nil
		})
		sort.Slice(bags, func(i, j int) bool { return bags[i].RequestRisk.Value < bags[j].RequestRisk.Value })
		bound := bags[int(math.Ceil(0.995*float64(len(bags))))-1].RequestRisk.Value
		for _, r := range bags {
			if r.RequestRisk.Value >= bound {
				rows = append(rows, row{"event_time": r.Event.Time, "source": r.Event.Source, "event_id": r.Event.ID,
					"labels": r.Event.Data.Labels, "request_risk": r.RequestRisk.Value, "threshold": bound,
					"calibrated_from": len(bags)})
			}
		}
		return rows
	},
	"How much was not scored, and why?": func(in *installation) (rows []row) {
		type key struct {
			day             time.Time
			outcome, reason string
		}
		counts, days := map[key]int{}, map[time.Time]int{}
		add := func(at time.Time, outcome schema.Outcome, reason string) {
			at = at.UTC() // times of two zones are two keys
			if in.now.Sub(at) < 7*day {
				counts[key{at.Truncate(day), string(outcome), reason}]++
				days[at.Truncate(day)]++
			}
		}
		for _, r := range in.requests { // canaries count
			add(r.Event.Time, schema.OutcomeScore, "")
		}
		for _, s := range in.skips {
			add(s.Event.Time, schema.OutcomeSkip, string(s.Reason))
		}
		for _, d := range in.dead {
			add(in.now, schema.OutcomeDeadLetter, string(d.Kind))
		}
		for k, n := range counts {
			rows = append(rows, row{"day": k.day, "outcome": k.outcome, "reason": k.reason, "messages": n,
				"percent_of_the_day": round(100*float64(n)/float64(days[k.day]), 2)})
		}
		return rows
	},
	"Which producer sends broken events, and what is wrong with them?": func(in *installation) (rows []row) {
		senders := map[string]int{}
		for _, d := range in.dead {
			senders[d.Source]++
		}
		for sender, n := range senders {
			rows = append(rows, row{"kind": "invalid", "field": "data.seed", "reason": "is missing", "sender": sender,
				"messages": n, "newest": recent, "example": "{}"})
		}
		return rows
	},
	"What became of one event?": func(in *installation) (rows []row) {
		r := in.requests[100]
		state := any(nil)
		if r.review != "" {
			state = r.review
			if in.verdicts[r.Event.ID] != "" {
				state = "resolved"
			}
		}
		var severities []string
		for _, a := range r.alerts {
			severities = append(severities, string(a.Measurement)+" "+string(a.Severity))
		}
		slices.Sort(severities)
		raised := any(nil)
		if len(severities) > 0 {
			raised = strings.Join(severities, ", ")
		}
		risk := any(nil)
		if r.RequestRisk != nil {
			risk = r.RequestRisk.Value
		}
		return []row{{"model": answersModel, "outcome": "score", "reason": "", "stream": "GENERATION", "sequence": 101,
			"delivered": 1, "recorded_at": recent, "class_label": r.ClassLabel, "class_gap": r.ClassGap.Value,
			"request_risk": risk, "ensemble_digest": answersDigest, "alerts": raised, "review_state": state}}
	},
	"Which alerts does nobody look at?": func(in *installation) (rows []row) {
		type key struct{ severity, class string }
		oldest, counts := map[key]time.Time{}, map[key]int{}
		for _, r := range in.production(100 * day) {
			if in.verdicts[r.Event.ID] != "" {
				continue
			}
			for _, a := range r.alerts {
				k := key{string(a.Severity), a.ClassLabel}
				counts[k]++
				if old, ok := oldest[k]; !ok || a.FiredAt.Before(old) {
					oldest[k] = a.FiredAt
				}
			}
		}
		for k, n := range counts {
			rows = append(rows, row{"severity": k.severity, "class_label": k.class, "open": n, "oldest": oldest[k],
				"waits": recent})
		}
		return rows
	},
	"Are the alerts right?": func(in *installation) (rows []row) {
		week := in.resolved.Truncate(day)
		for week.Weekday() != time.Monday {
			week = week.Add(-day)
		}
		resolved := slices.DeleteFunc(slices.Clone(in.requests), func(r request) bool {
			return in.verdicts[r.Event.ID] == ""
		})
		for class, list := range by(resolved, label) {
			n := map[schema.ReviewVerdict]int{}
			for _, r := range list {
				n[in.verdicts[r.Event.ID]]++
			}
			confirmed, wrong := n[schema.VerdictConfirmed], n[schema.VerdictFalseAlarm]
			precision := any(nil)
			if confirmed+wrong > 0 {
				precision = round(float64(confirmed)/float64(confirmed+wrong), 3)
			}
			rows = append(rows, row{"week": week, "class_label": class, "resolved": len(list), "confirmed": confirmed,
				"false_alarms": wrong, "precision": precision})
		}
		return rows
	},
	"Is one component of the ensemble broken?": func(in *installation) (rows []row) {
		for class, list := range by(in.production(day), label) {
			for component := range 3 {
				mean := 0.0
				for _, r := range list {
					mean += r.ClassGap.Shares[component] / float64(len(list))
				}
				rows = append(rows, row{"class_label": class, "component": component + 1, "mean_share": mean})
			}
		}
		return rows
	},
	"Does traffic drift?": func(in *installation) (rows []row) {
		all := in.production(35 * day)
		now := in.production(7 * day)
		for class, list := range by(all, label) {
			recently := len(by(now, label)[class])
			share := float64(recently) / float64(len(now))
			before := float64(len(list)-recently) / float64(len(all)-len(now))
			rows = append(rows, row{"class_label": class, "share_now": share, "share_before": before, "ratio": share / before})
		}
		return rows
	},
	"Which thresholds decide, and do they hold what they promised?": func(in *installation) (rows []row) {
		list := in.production(7 * day)
		for _, severity := range schema.Severities() {
			fired := count(list, func(r request) (n int) {
				for _, a := range r.alerts {
					if a.Severity == severity && a.Measurement == schema.ClassGap {
						n++
					}
				}
				return n
			})
			rows = append(rows, row{"measurement": "class_gap", "severity": string(severity), "value": 0.09,
				"origin": "manual", "calibrated_from": 100, "alpha": 0.01, "achieved": 0.01,
				"alert_rate": float64(fired) / float64(len(list))})
		}
		return rows
	},
	"When is the generator asked for what it does not know?": func(in *installation) (rows []row) {
		for hour, list := range by(in.production(14*day), func(r request) int { return r.Event.Time.Hour() }) {
			mean, _ := moments(list)
			with := func(severity schema.Severity) int {
				return count(list, func(r request) int {
					if slices.ContainsFunc(r.alerts, func(a schema.Alert) bool { return a.Severity == severity }) {
						return 1
					}
					return 0
				})
			}
			critical := with(schema.SeverityCritical)
			rows = append(rows, row{"hour_of_day": hour, "requests": len(list), "with_warning": with(schema.SeverityWarn),
				"with_critical": critical, "critical_per_thousand": 1000 * float64(critical) / float64(len(list)),
				"mean_gap": mean})
		}
		return rows
	},
	"Does the monitor catch what it should catch?": func(in *installation) (rows []row) {
		canaries := slices.DeleteFunc(slices.Clone(in.requests), func(r request) bool { return !r.canary })
		for class, list := range by(canaries, label) {
			caught := count(list, func(r request) int { return min(1, len(r.alerts)) })
			rows = append(rows, row{"model": answersModel, "class_label": class, "caught": caught,
				"missed": len(list) - caught, "newest": recent})
		}
		return rows
	},
	"Which classes does the judge find wrong, and is it the data?": func(in *installation) (rows []row) {
		for class, list := range by(in.production(7*day), label) {
			sum, n := 0.0, 0
			for _, r := range list {
				if r.ImageRisk != nil {
					sum, n = sum+r.ImageRisk.Value, n+1
				}
			}
			mean := any(nil)
			if n > 0 {
				mean = sum / float64(n)
			}
			i := list[0].ClassIndex
			rows = append(rows, row{"class_label": class, "judged": n, "mean_image_risk": mean, "images": 100 * i,
				"n_eff": float64(i) / 2, "likely_mislabeled": i, "judge_accuracy": 0.5})
		}
		return rows
	},
	"What did the scores cost?": func(in *installation) (rows []row) {
		type key struct {
			day    time.Time
			device string
		}
		young := slices.DeleteFunc(slices.Clone(in.requests), func(r request) bool { return r.age >= 7*day })
		for k, list := range by(young, func(r request) key { return key{r.Event.Time.Truncate(day), r.Receipt.Device} }) {
			sum := count(list, func(r request) int { return r.Receipt.Rows })
			rows = append(rows, row{"day": k.day, "device": k.device, "scores": len(list), "rows": sum,
				"rows_per_score": float64(sum) / float64(len(list))})
		}
		return rows
	},
}

// elsewhere are the answers to the queries of other documents, in the order in which they stand there.
var elsewhere = map[string][]func(*installation) []row{
	"events.md": {func(in *installation) (rows []row) {
		for _, d := range in.dead {
			if d.Source == "//studio/render-7" {
				rows = append(rows, row{"recorded_at": recent, "field": d.Field, "reason": d.Reason, "event_id": d.EventID})
			}
		}
		return rows
	}},
	"sampling.md": {func(in *installation) (rows []row) {
		for class, list := range by(in.production(7*day), label) {
			mean, _ := moments(list)
			warned := count(list, func(r request) int {
				if slices.ContainsFunc(r.alerts, func(a schema.Alert) bool { return a.Severity == schema.SeverityWarn }) {
					return 1
				}
				return 0
			})
			rows = append(rows, row{"class_label": class, "scores": len(list), "requests": len(list), "requests_se": 0,
				"class_gap_mean": mean, "warnings": warned, "warnings_se": 0})
		}
		return rows
	}},
	"scaling.md": {func(in *installation) (rows []row) {
		for class, list := range by(in.production(7*day), label) {
			sum, weights := 0.0, 0.0
			for _, r := range list {
				if r.RequestRisk != nil {
					sum += r.RequestRisk.Value / r.RequestRiskProbability
					weights += 1 / r.RequestRiskProbability
				}
			}
			rows = append(rows, row{"class_label": class, "mean_risk": sum / weights})
		}
		return rows
	}},
}

// recent stands for a time of the test itself, or a duration up to it.
const recent = "recent"

// text returns a row in a form that is equal if the rows are: numbers to nine digits.
func (r row) text(t *testing.T) string {
	t.Helper()
	var parts []string
	for _, column := range slices.Sorted(maps.Keys(r)) {
		parts = append(parts, column+"="+cell(t, r[column]))
	}
	return strings.Join(parts, " | ")
}

func cell(t *testing.T, v any) string {
	t.Helper()
	switch v := v.(type) {
	case nil:
		return "NULL"
	case pgtype.Numeric:
		f, err := v.Float64Value()
		if err != nil {
			t.Fatal(err)
		}
		return cell(t, f.Float64)
	case float64:
		return strconv.FormatFloat(v, 'g', 9, 64)
	case time.Time:
		return v.UTC().Format(time.RFC3339Nano)
	case map[string]string, map[string]any:
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if n, err := strconv.ParseFloat(fmt.Sprint(v), 64); err == nil {
		return strconv.FormatFloat(n, 'g', 9, 64)
	}
	return fmt.Sprint(v)
}

// TestAnswers holds the answer of every query of docs/sql.md against one that is computed from what was written.
func TestAnswers(t *testing.T) {
	url := pgtest.URL(t)
	store, err := postgres.Open(t.Context(), postgres.Config{URL: url, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	in := newInstallation(t, store)
	conn := reader(t, url)
	// The zone of a reader's session changes no answer.
	if _, err := conn.Exec(t.Context(), `SET timezone = 'America/New_York'`); err != nil {
		t.Fatal(err)
	}
	asked := map[string]bool{}
	for _, q := range cookbook(t) {
		asked[q[0]] = true
		answer, ok := answers[q[0]]
		if !ok {
			t.Errorf("%s: no answer is computed", q[0])
			continue
		}
		t.Run(q[0], func(t *testing.T) { compare(t, conn, strings.ReplaceAll(q[1], "'class 8'", "'Bag'"), answer(in)) })
	}
	for question := range answers {
		if !asked[question] {
			t.Errorf("docs/sql.md does not ask: %s", question)
		}
	}
}

// TestAnswersElsewhere does the same for the queries of every other document.
func TestAnswersElsewhere(t *testing.T) {
	url := pgtest.URL(t)
	store, err := postgres.Open(t.Context(), postgres.Config{URL: url, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	in, conn := newInstallation(t, store), reader(t, url)
	paths, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(paths, "../README.md", "../CONTRIBUTING.md") {
		name := filepath.Base(path)
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile("(?s)```sql\n(.*?)```").FindAllStringSubmatch(string(content), -1)
		if name == "sql.md" {
			continue
		}
		if len(found) != len(elsewhere[name]) {
			t.Errorf("%s has %d queries, and %d answers are computed", name, len(found), len(elsewhere[name]))
			continue
		}
		for i, query := range found {
			compare(t, conn, query[1], elsewhere[name][i](in))
		}
	}
}

// compare runs a query, and holds its rows against those that are wanted, in any order.
func compare(t *testing.T, conn *pgx.Conn, sql string, want []row) {
	t.Helper()
	rows, err := conn.Query(context.Background(), sql)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowToMap)
	if err != nil {
		t.Fatal(err)
	}
	passing := map[string]bool{}
	for _, r := range want {
		for column, v := range r {
			passing[column] = passing[column] || v == recent
		}
	}
	var have, expected []string
	for _, r := range got {
		for column := range r {
			if at, ok := r[column].(time.Time); ok && passing[column] && time.Since(at) < time.Hour {
				r[column] = recent
			} else if _, ok := r[column].(pgtype.Interval); ok && passing[column] {
				r[column] = recent
			}
		}
		have = append(have, row(r).text(t))
	}
	for _, r := range want {
		expected = append(expected, r.text(t))
	}
	slices.Sort(have)
	slices.Sort(expected)
	if len(expected) == 0 || !slices.Equal(have, expected) {
		t.Errorf("the query says\n%s\nwant\n%s", strings.Join(have, "\n"), strings.Join(expected, "\n"))
	}
}

package postgres_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// besideVerdicts are the views that show scores beside the verdicts, and the queries that read them.
var besideVerdicts = map[string]string{
	"decuwatch.series_scores": "", "decuwatch.series_measurements": "", "decuwatch_views.all_scores": "",
	"decuwatch_views.rescore_failures": "",
}

var readBesideVerdicts = []string{
	"rescore_candidates.sql", "rescore_cost.sql", "rescore_rate.sql", "rescore_source.sql", "samples.sql",
	"score_of_event.sql", "score_values.sql", "series_known.sql", "series_pairs.sql", "insert_rescore_failure.sql",
	"rescore_failures.sql",
}

const newDigest = "2222222222222222222222222222222222222222222222222222222222222222"

// rescored returns a score of the same event by another series.
func rescored(id, digest, settings string, gap, risk float64) *schema.Score {
	s := score(id, gap, risk)
	s.Receipt.EnsembleDigest, s.Receipt.Settings = digest, settings
	return s
}

// shown returns what every view shows, and what the store answers, by name.
func shown(t *testing.T, s *postgres.Store, conn *pgx.Conn) map[string]string {
	t.Helper()
	ctx := testContext(t)
	seen := map[string]string{}
	views := list(t, conn, `SELECT c.oid::regclass::text FROM pg_catalog.pg_class c
		WHERE c.relnamespace IN ('decuwatch'::regnamespace, 'decuwatch_views'::regnamespace) AND relkind = 'v'`)
	for _, view := range views {
		if _, ok := besideVerdicts[view]; ok {
			continue
		}
		seen[view] = strings.Join(list(t, conn, `SELECT to_jsonb(v)::text FROM `+view+` v ORDER BY 1`), "\n")
	}
	of := score("one", 0, 0).Series()
	from, to := at.Add(-time.Hour), at.Add(time.Hour)
	answer := func(name string, v any, err error) {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		seen[name] = string(text)
	}
	for _, m := range schema.MeasurementNames() {
		samples, err := s.Samples(ctx, of, m, from, to)
		answer("Samples of "+string(m), samples, err)
		values, err := s.ScoreValues(ctx, of, m, nil, from, 100)
		answer("ScoreValues of "+string(m), values, err)
		value, n, err := s.Tail(ctx, of, m, []int{1}, from, 0.5)
		answer("Tail of "+string(m), []any{value, n}, err)
	}
	sequences, err := s.ClassSequences(ctx, of, from, time.Hour, 100)
	answer("ClassSequences", sequences, err)
	distances, err := s.ClassGapDistances(ctx, of, []int{1}, from, 100)
	answer("ClassGapDistances", distances, err)
	tally, err := s.TallyReviews(ctx, "", nil, from.Truncate(time.Hour), to.Truncate(time.Hour).Add(time.Hour))
	answer("TallyReviews", tally, err)
	verdicts, err := s.VerdictsBySequence(ctx, "GENERATION", 0, 100)
	answer("VerdictsBySequence", verdicts, err)
	for _, id := range []string{"one", "two"} {
		stored, err := s.ScoreByID(ctx, schema.Identity{ID: id})
		answer("ScoreByID "+id, []any{stored, stored.Event}, err)
		standing, found, err := s.Lookup(ctx, stored.Event.Identity(), digestOf(id))
		answer("Lookup "+id, []any{standing.Outcome, standing.Score.Receipt, standing.AlertIDs, found}, err)
	}
	if len(views) < 20 {
		t.Fatalf("only %d views", len(views))
	}
	return seen
}

// Whatever reads scores finds each event once, if its event was scored again: by a shadow ensemble, by the same
// ensemble with other settings, or even by the same series.
func TestScoresBesideVerdictsCountNothingTwice(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	for i, id := range []string{"one", "two"} {
		v := scoreVerdict(uint64(i)+1, id)
		v.Alerts = []schema.Alert{alert(v.Score, "alert of "+id)}
		mustRecord(t, s, v)
	}
	before := shown(t, s, conn)
	for _, r := range []schema.Rescore{
		{Score: rescored("one", newDigest, seriesSettings, 0.9, 0.8), Purpose: schema.PurposeShadow},
		{Score: rescored("one", ensembleDigest, "other settings", 0.9, 0.8), Purpose: schema.PurposeRescore},
		{Score: rescored("two", ensembleDigest, seriesSettings, 0.9, 0.8), Purpose: schema.PurposeRescore},
	} {
		if first, err := s.RecordRescore(ctx, r); err != nil || !first {
			t.Fatalf("first %t, %v", first, err)
		}
		if first, err := s.RecordRescore(ctx, r); err != nil || first {
			t.Errorf("again: first %t, %v", first, err)
		}
	}
	if err := s.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	for name, is := range shown(t, s, conn) {
		if is != before[name] {
			t.Errorf("%s changed:\n%s\nwas\n%s", name, is, before[name])
		}
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.all_scores`); n != 5 {
		t.Errorf("%d scores of all purposes, want 5", n)
	}
	of := schema.Series{Model: "fashion-mnist", EnsembleDigest: newDigest, Settings: seriesSettings}
	samples, err := s.Samples(ctx, of, schema.ClassGap, at.Add(-time.Hour), at.Add(time.Hour))
	if err != nil || len(samples) != 1 || samples[0].Value != 0.9 {
		t.Errorf("samples of the shadow: %+v, %v", samples, err)
	}
	// A third verdict changes what is shown: the comparison above can fail.
	mustRecord(t, s, scoreVerdict(3, "three"))
	changed := 0
	for name, is := range shown(t, s, conn) {
		if is != before[name] {
			changed++
		}
	}
	if changed < 10 {
		t.Errorf("a new verdict changed only %d answers", changed)
	}
}

// Only queries that are meant to read scores beside the verdicts: a new one is decided on, and then listed.
func TestQueriesThatReadBesideVerdicts(t *testing.T) {
	beside := regexp.MustCompile(`\b(rescores|series_scores|series_measurements|all_scores|rescore_failures)\b`)
	files, err := filepath.Glob("queries/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	dashboards, err := filepath.Glob("../../deploy/grafana/dashboards/*.json")
	if err != nil || len(dashboards) == 0 {
		t.Fatal("no dashboards", err)
	}
	for _, file := range append(files, dashboards...) {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		listed := slices.Contains(readBesideVerdicts, filepath.Base(file))
		if reads := beside.Match(content); reads != listed {
			t.Errorf("%s reads scores beside the verdicts: %t, listed: %t", file, reads, listed)
		}
	}
}

// A column of scores is one of rescores, and of the views over both.
func TestRescoresHaveTheColumnsOfScores(t *testing.T) {
	_, conn := open(t, postgres.Config{})
	columns := func(relation string) []string {
		return list(t, conn, `SELECT attname || ' ' || format_type(atttypid, atttypmod) || CASE WHEN attnotnull
				AND relkind <> 'v' THEN ' NOT NULL' ELSE '' END || coalesce(' DEFAULT ' || pg_get_expr(adbin, adrelid), '')
			FROM pg_catalog.pg_attribute JOIN pg_catalog.pg_class c ON c.oid = attrelid
			LEFT JOIN pg_catalog.pg_attrdef d ON adrelid = attrelid AND adnum = attnum
			WHERE attrelid = '`+relation+`'::regclass AND attnum > 0 AND NOT attisdropped AND attname <> 'purpose'
			ORDER BY attname`)
	}
	for _, pair := range [][2]string{
		{"decuwatch.scores", "decuwatch.rescores"}, {"decuwatch.production_scores", "decuwatch.series_scores"},
		{"decuwatch_views.scores", "decuwatch_views.all_scores"},
	} {
		if want, got := columns(pair[0]), columns(pair[1]); !reflect.DeepEqual(want, got) {
			t.Errorf("%s has %v,\n%s has %v", pair[0], want, pair[1], got)
		}
	}
	checks := func(table string) []string {
		return list(t, conn, `SELECT pg_get_constraintdef(oid) FROM pg_catalog.pg_constraint WHERE contype = 'c'
			AND conrelid = '`+table+`'::regclass AND pg_get_constraintdef(oid) NOT LIKE '%purpose%' ORDER BY 1`)
	}
	for i, want := range checks("decuwatch.scores") {
		want = strings.TrimSuffix(want, " NOT VALID")
		if got := checks("decuwatch.rescores"); i >= len(got) || !slices.Contains(got, want) {
			t.Errorf("rescores has no %s", want)
		}
	}
}

// The measurements of a score beside the verdict are read as those of the verdict are.
func TestMeasurementsAreReadAlike(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	live := score("one", 0.2, 0.1)
	live.ImageRisk = &schema.Measurement{Estimator: "judge", Value: 0.4, UpperBound: 1, Distances: [][]float64{},
		Shares: []float64{}}
	mustRecord(t, s, schema.Verdict{Delivery: delivery(1, "one"), Score: live})
	again := *live
	again.Receipt.EnsembleDigest = newDigest
	_, err := s.RecordRescore(testContext(t), schema.Rescore{Score: &again, Purpose: schema.PurposeShadow})
	if err != nil {
		t.Fatal(err)
	}
	const row = `SELECT (to_jsonb(m) - 'ensemble_digest')::text FROM `
	want := list(t, conn, row+`decuwatch.production_measurements m ORDER BY 1`)
	got := list(t, conn, row+`decuwatch.series_measurements m WHERE ensemble_digest = $1 ORDER BY 1`, newDigest)
	if len(want) != len(schema.MeasurementNames()) || !slices.Equal(want, got) {
		t.Errorf("live:\n%s\nbeside it:\n%s", strings.Join(want, "\n"), strings.Join(got, "\n"))
	}
	if stored := count(t, conn, `SELECT count(*) FROM decuwatch.series_measurements
		WHERE ensemble_digest = $1`, ensembleDigest); stored != len(want) {
		t.Errorf("%d measurements of the live series", stored)
	}
}

// An alert of a re-score is stored, owed and reviewed with it, and its evidence finds its score.
func TestAlertsOfRescores(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	mustRecord(t, s, scoreVerdict(1, "one"))
	again := rescored("one", newDigest, seriesSettings, 0.9, 0.8)
	r := schema.Rescore{Score: again, Purpose: schema.PurposeRescore, Alerts: []schema.Alert{alert(again, "again")}}
	for range 2 {
		if _, err := s.RecordRescore(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	for what, query := range map[string]string{
		"alert":  `SELECT count(*) FROM decuwatch.alerts WHERE id = 'again'`,
		"outbox": `SELECT count(*) FROM decuwatch.outbox WHERE message_id = 'again'`,
		"review": `SELECT count(*) FROM decuwatch.reviews WHERE alert_id = 'again'`,
	} {
		if n := count(t, conn, query); n != 1 {
			t.Errorf("%d rows of the %s", n, what)
		}
	}
	job, found, err := s.NextEvidence(ctx, []string{newDigest}, time.Minute)
	if err != nil || !found || job.Score == nil || job.Score.ClassGap.Value != 0.9 {
		t.Errorf("evidence job %+v, found %t, %v", job, found, err)
	}
}

// What is scored again: events without a score of the series, from where the last page ended.
func TestRescoreCandidates(t *testing.T) {
	s, _ := open(t, postgres.Config{})
	ctx := testContext(t)
	for i := range 5 {
		v := scoreVerdict(uint64(i)+1, fmt.Sprint("event ", i))
		v.Score.Event.Time = at.Add(time.Duration(i/2) * time.Second) // some share their time
		v.Score.ClassIndex = i % 2
		mustRecord(t, s, v)
	}
	if err := s.AddCanary(ctx, postgres.Canary{Source: "//studio/render", EventID: "event 4", Model: "fashion-mnist",
		DueAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	q := postgres.RescoreQuery{
		Series: schema.Series{Model: "fashion-mnist", EnsembleDigest: newDigest, Settings: seriesSettings},
		Since:  at, Until: at.Add(time.Minute),
	}
	all := func() (ids []string) {
		var after postgres.StoredEvent
		for {
			page, err := s.RescoreCandidates(ctx, q, after, 2)
			if err != nil {
				t.Fatal(err)
			}
			if len(page) == 0 {
				return ids
			}
			for _, e := range page {
				ids, after = append(ids, e.ID), e
			}
		}
	}
	if got := all(); !slices.Equal(got, []string{"event 0", "event 1", "event 2", "event 3"}) {
		t.Errorf("candidates %v", got)
	}
	done := rescored("event 1", newDigest, seriesSettings, 1, 1)
	if _, err := s.RecordRescore(ctx, schema.Rescore{Score: done, Purpose: schema.PurposeShadow}); err != nil {
		t.Fatal(err)
	}
	q.Classes = []int{1}
	if got := all(); !slices.Equal(got, []string{"event 3"}) {
		t.Errorf("candidates of a class, one of which is done: %v", got)
	}
	q.Classes, q.Series.EnsembleDigest = nil, ensembleDigest
	if got := all(); len(got) != 0 {
		t.Errorf("%v are scored again by the series of their verdicts", got)
	}
	e := postgres.StoredEvent{Time: at, Source: "//studio/render", ID: "event 1"}
	q.Series.EnsembleDigest = newDigest
	if stored, known, err := s.RescoreSource(ctx, e, q.Series); err != nil || !known || stored.Event.ID != "event 1" {
		t.Errorf("known %t, %v", known, err)
	}
	e.ID = "gone"
	if _, _, err := s.RescoreSource(ctx, e, q.Series); !errors.Is(err, postgres.ErrNotFound) {
		t.Errorf("an event without a score: %v", err)
	}
}

// A shadow gets every event that got a live score of another ensemble after it began, once, also if giving failed.
func TestFeedShadow(t *testing.T) {
	s, _ := open(t, postgres.Config{CommitTimeout: time.Millisecond * 500})
	ctx := testContext(t)
	mustRecord(t, s, scoreVerdict(1, "earlier"))
	var given []string
	fails := errors.New("the queue is away")
	failed := false
	feed := func() bool {
		t.Helper()
		_, more, err := s.FeedShadow(ctx, "fashion-mnist", newDigest, 2, func(events []postgres.StoredEvent) error {
			if !failed {
				failed = true
				return fails
			}
			for _, e := range events {
				given = append(given, e.ID)
			}
			return nil
		})
		if err != nil && !errors.Is(err, fails) {
			t.Fatal(err)
		}
		return more
	}
	feed()
	for i := range 3 {
		mustRecord(t, s, scoreVerdict(uint64(i)+2, fmt.Sprint("event ", i)))
	}
	own := scoreVerdict(9, "own")
	own.Score.Receipt.EnsembleDigest = newDigest
	mustRecord(t, s, own)
	for end := time.Now().Add(deadline); len(given) < 3 && time.Now().Before(end); {
		feed()
	}
	for feed() {
	}
	if want := []string{"event 0", "event 1", "event 2"}; !failed || !slices.Equal(given, want) {
		t.Errorf("given %v, want %v", given, want)
	}
}

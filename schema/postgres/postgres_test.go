package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// deadline bounds a test; it is far above what a test needs.
const deadline = 2 * time.Minute

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	return ctx
}

// at is the time of the tests' events: recent, with microseconds.
var at = time.Now().UTC().Truncate(time.Hour).Add(-48*time.Hour + 123456*time.Microsecond)

const (
	ensembleDigest = "1111111111111111111111111111111111111111111111111111111111111111"
	seriesSettings = "ddim/20/2/0 class_gap:paide-w2@0+1 request_risk:mean-w2@10+1"
)

func digestOf(s string) string { return schema.Digest(nil, []byte(s)) }

func event(id string) schema.Event {
	index, timestep := 3, 901.5
	return schema.Event{
		Source: "//studio/render", ID: id, Time: at, TraceParent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		Data: schema.Generation{
			Model: "fashion-mnist", Class: schema.ClassLabel("Trouser"), Seed: math.MaxUint64, Noise: "torch-cpu",
			NoiseDtype: "float16", BatchIndex: &index, BatchSize: 8, NoiseOffset: math.MaxUint64 - 3,
			GPU: &schema.GPU{SMs: 132, ThreadsPerSM: 2048}, Latent: &schema.Latent{Bucket: "b", Name: "n", Shape: []int{4, 8, 8},
				Step: 7, Timestep: &timestep}, Labels: map[string]string{"tenant": "acme", "region": "eu"},
			Sampler: &schema.Sampler{Name: "ddim", Steps: 50, GuidanceScale: 7.5},
		},
	}
}

func measurement(value float64) schema.Measurement {
	return schema.Measurement{
		Estimator: "paide-w2", Value: value, UpperBound: math.Log(2), MeanDistance: value * 3,
		Distances: [][]float64{{0, 1.0 / 3}, {1.0 / 3, 0}}, Shares: []float64{0.5, 0.5}, BranchStep: 10, RolloutSteps: 1,
	}
}

func score(id string, gap, risk float64) *schema.Score {
	return &schema.Score{
		Event: event(id), ClassIndex: 1, ClassLabel: "Trouser", ClassGap: measurement(gap),
		RequestRisk: new(measurement(risk)), RequestRiskProbability: 1,
		Receipt: schema.Receipt{
			EnsembleDigest: ensembleDigest, Profile: "fixed", Settings: seriesSettings, Steps: 20, GuidanceScale: 2,
			Seed: math.MaxUint64, Noise: "torch-cpu", Carrier: 1, Rows: 40, Runtime: "onnxruntime 1.27.0", Device: "cpu",
			Deviations: []string{"sampler: 50 steps were replaced by 20"}, NoiseDtype: "float16",
			NoiseOffset: math.MaxUint64 - 3,
			SMs:         132, ThreadsPerSM: 2048, BatchIndex: 3, BatchSize: 8, LatentSHA256: ensembleDigest, LatentStep: 7,
		},
		ScoredAt: at.Add(time.Second),
	}
}

func alert(s *schema.Score, id string) schema.Alert {
	a := schema.Alert{
		ID: id, Kind: "score", Source: s.Event.Source, EventID: s.Event.ID, EventTime: s.Event.Time,
		Model: s.Event.Data.Model, ClassIndex: s.ClassIndex, ClassLabel: s.ClassLabel, Labels: s.Event.Data.Labels,
		Severity: schema.SeverityWarn, Reason: "class_threshold", Measurement: schema.ClassGap,
		Value: s.ClassGap.Value, Decided: s.ClassGap.Value, Threshold: 0.1, ThresholdID: 7,
		ClassGap: s.ClassGap.Value, Receipt: s.Receipt, FiredAt: s.ScoredAt,
	}
	if s.RequestRisk != nil {
		a.RequestRisk = &s.RequestRisk.Value
	}
	return a
}

func delivery(sequence uint64, message string) schema.Delivery {
	return schema.Delivery{Stream: "GENERATION", Sequence: sequence, Delivered: 1, Digest: digestOf(message)}
}

func scoreVerdict(sequence uint64, id string) schema.Verdict {
	return schema.Verdict{Delivery: delivery(sequence, id), Score: score(id, 0.2, 0.1)}
}

func mustRecord(t testing.TB, s *postgres.Store, v schema.Verdict) postgres.Recorded {
	t.Helper()
	r, err := s.Record(testContext(t), v)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// connect returns a connection of the superuser to the store's database, for looking at tables.
func connect(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(testContext(t), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func count(t testing.TB, conn *pgx.Conn, query string, args ...any) int {
	t.Helper()
	var n int
	if err := conn.QueryRow(testContext(t), query, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func open(t testing.TB, c postgres.Config) (*postgres.Store, *pgx.Conn) {
	t.Helper()
	c.URL = pgtest.URL(t)
	s, err := postgres.Open(testContext(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, connect(t, c.URL)
}

func TestFirstVerdictStands(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	v := scoreVerdict(1, "one")
	v.Alerts = []schema.Alert{alert(v.Score, "alert-one")}
	first := mustRecord(t, s, v)
	if !first.First || first.Outcome != schema.OutcomeScore || first.Score != v.Score ||
		!reflect.DeepEqual(first.AlertIDs, []string{"alert-one"}) {
		t.Fatalf("first: %+v", first)
	}
	// A redelivery that leads to another score, or even another outcome, changes nothing.
	again := scoreVerdict(1, "one")
	again.Score.ClassGap.Value = 0.6
	for _, v := range []schema.Verdict{again, {Delivery: delivery(1, "one"),
		DeadLetter: &schema.DeadLetter{Event: &v.Score.Event, Kind: "failed", Reason: "five times"}}} {
		second := mustRecord(t, s, v)
		if second.First || second.Outcome != schema.OutcomeScore ||
			!reflect.DeepEqual(second.AlertIDs, []string{"alert-one"}) {
			t.Errorf("second: %+v", second)
		}
		if !reflect.DeepEqual(second.Score, first.Score) {
			t.Errorf("the first score did not come back:\n got %+v\nwant %+v", second.Score, first.Score)
		}
	}
	looked, ok, err := s.Lookup(testContext(t), event("one").Identity(), digestOf("one"))
	if err != nil || !ok || !reflect.DeepEqual(looked.Score, v.Score) {
		t.Errorf("lookup: %+v %t %v", looked, ok, err)
	}
	if _, ok, err := s.Lookup(testContext(t), event("two").Identity(), digestOf("two")); ok || err != nil {
		t.Errorf("lookup of an event without verdict: %t %v", ok, err)
	}
	for table, want := range map[string]int{"events": 1, "scores": 1, "alerts": 1, "outbox": 1, "reviews": 1,
		"evidence_jobs": 1, "dead_letters": 0, "class_hour_parts": 1, "outcome_hour_parts": 1} {
		if n := count(t, conn, "SELECT count(*) FROM decuwatch."+table); n != want {
			t.Errorf("%d rows in %s, want %d", n, table, want)
		}
	}
}

func TestIdentifierUsedTwice(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	mustRecord(t, s, scoreVerdict(1, "one"))
	v := scoreVerdict(2, "one")
	v.Delivery.Digest = digestOf("something else")
	var invalid *schema.Invalid
	if _, err := s.Record(testContext(t), v); !errors.As(err, &invalid) || invalid.Field != "id" {
		t.Fatalf("got %v, want Invalid on id", err)
	}
	if _, _, err := s.Lookup(testContext(t), event("one").Identity(), v.Delivery.Digest); !errors.As(err, &invalid) ||
		invalid.Field != "id" {
		t.Fatalf("lookup: got %v, want Invalid on id", err)
	}
	letter := schema.Verdict{Delivery: v.Delivery, DeadLetter: &schema.DeadLetter{Event: &v.Score.Event,
		Kind: "duplicate_id", Field: "id", Reason: invalid.Reason, Payload: []byte("x")}}
	if r := mustRecord(t, s, letter); !r.First || r.Outcome != schema.OutcomeDeadLetter {
		t.Errorf("dead letter: %+v", r)
	}
	if r := mustRecord(t, s, letter); r.First || r.Outcome != schema.OutcomeDeadLetter {
		t.Errorf("dead letter again: %+v", r)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.dead_letters`); n != 1 {
		t.Errorf("%d dead letters, want 1", n)
	}
	if n := count(t, conn, `SELECT sum(n) FROM decuwatch_views.coverage`); n != 2 {
		t.Errorf("coverage counts %d verdicts, want 2", n)
	}
	verdicts, err := s.VerdictsBySequence(testContext(t), "GENERATION", 1, 10)
	if err != nil || len(verdicts) != 2 || verdicts[0].Outcome != "score" || verdicts[1].Reason != "duplicate_id" {
		t.Errorf("by sequence: %+v %v", verdicts, err)
	}
}

func TestUndecodableMessage(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	payload := append([]byte("\x00\xff not json "), make([]byte, 70_000)...)
	v := schema.Verdict{Delivery: delivery(5, "bad"), DeadLetter: &schema.DeadLetter{
		Subject: "generation.requested.fashion-mnist", Payload: payload, Kind: "invalid", Field: "pay\x00load",
		Reason: "is not \xff JSON",
	}}
	for i := range 2 {
		if r := mustRecord(t, s, v); r.First != (i == 0) {
			t.Errorf("call %d: %+v", i, r)
		}
	}
	// The same sequence of a stream that was made anew is another message.
	v.Delivery.Digest = digestOf("other")
	if r := mustRecord(t, s, v); !r.First {
		t.Errorf("a stream made anew: %+v", r)
	}
	var n int
	var model string
	if err := conn.QueryRow(testContext(t),
		`SELECT octet_length(payload), model FROM decuwatch.dead_letters LIMIT 1`).Scan(&n, &model); err != nil ||
		n != schema.MaxPayload || model != "fashion-mnist" {
		t.Errorf("payload of %d bytes, model %q, %v", n, model, err)
	}
}

func TestSkip(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	v := schema.Verdict{Delivery: delivery(1, "s"), Skip: &schema.Skip{Event: event("s"), Reason: "noise",
		Detail: "torch-mps"}}
	if r := mustRecord(t, s, v); !r.First || r.Outcome != schema.OutcomeSkip || r.Reason != "noise" {
		t.Errorf("%+v", r)
	}
	if r := mustRecord(t, s, scoreVerdict(1, "s")); r.First || r.Outcome != schema.OutcomeSkip || r.Reason != "noise" {
		// The digest of scoreVerdict(1, "s") is the skip's.
		t.Errorf("%+v", r)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.skips WHERE class = '"Trouser"'
		AND labels @> '{"tenant":"acme"}'`); n != 1 {
		t.Errorf("%d skips", n)
	}
}

func TestMalformedVerdict(t *testing.T) {
	s, _ := open(t, postgres.Config{})
	if _, err := s.Record(testContext(t), schema.Verdict{Delivery: delivery(1, "x")}); err == nil {
		t.Error("a verdict without content was taken")
	}
	two := scoreVerdict(1, "x")
	two.Skip = &schema.Skip{Event: event("x"), Reason: "r"}
	if _, err := s.Record(testContext(t), two); err == nil {
		t.Error("a verdict with two contents was taken")
	}
}

func TestNotFinite(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	for i, bad := range []float64{math.NaN(), math.Inf(1), math.Inf(-1)} {
		for j, set := range []func(*schema.Score){
			func(s *schema.Score) { s.ClassGap.Value = bad },
			func(s *schema.Score) { s.RequestRisk.MeanDistance = bad },
			func(s *schema.Score) { s.RequestRisk.Distances[0][1] = bad },
			func(s *schema.Score) { s.ClassGap.Shares[0] = bad },
			func(s *schema.Score) { s.Receipt.Eta = bad },
		} {
			v := scoreVerdict(1, "x")
			set(v.Score)
			if _, err := s.Record(testContext(t), v); !errors.Is(err, postgres.ErrNotFinite) {
				t.Errorf("%d/%d: got %v, want ErrNotFinite", i, j, err)
			}
		}
		v := scoreVerdict(1, "x")
		a := alert(v.Score, "a")
		a.Decided = bad
		v.Alerts = []schema.Alert{a}
		if _, err := s.Record(testContext(t), v); !errors.Is(err, postgres.ErrNotFinite) {
			t.Errorf("alert %d: got %v, want ErrNotFinite", i, err)
		}
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.events`); n != 0 {
		t.Errorf("%d rows were written", n)
	}
	// The database refuses it from any writer.
	mustRecord(t, s, scoreVerdict(1, "good"))
	for _, column := range []string{"class_gap", "request_risk", "class_gap_mean_distance", "guidance_scale"} {
		for _, bad := range []string{"NaN", "Infinity", "-Infinity"} {
			copyScore(t, conn, column, "'"+bad+"'::float8")
		}
	}
	for _, column := range []string{"class_gap_distances", "request_risk_shares"} {
		for _, bad := range []string{"NaN", "Infinity", "-Infinity"} {
			copyScore(t, conn, column, "ARRAY[0, '"+bad+"'::float8]")
		}
	}
}

// copyScore copies a score with one column changed and wants the database to refuse it by a constraint.
func copyScore(t *testing.T, conn *pgx.Conn, column, value string) {
	t.Helper()
	var columns []string
	rows, err := conn.Query(testContext(t),
		`SELECT column_name::text FROM information_schema.columns WHERE table_schema = 'decuwatch' AND table_name = 'scores'
			ORDER BY ordinal_position`)
	if err != nil {
		t.Fatal(err)
	}
	if columns, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
		t.Fatal(err)
	}
	list := strings.Join(columns, ", ")
	values := strings.NewReplacer(" "+column+",", " "+value+",", "event_id,", "event_id || 'x',").Replace(list)
	_, err = conn.Exec(testContext(t), "INSERT INTO decuwatch.scores ("+list+") SELECT "+values+" FROM decuwatch.scores")
	var refused interface{ SQLState() string }
	if !errors.As(err, &refused) || refused.SQLState() != "23514" {
		t.Errorf("%s = %s: got %v, want a check violation", column, value, err)
	}
}

func TestConcurrentCallsShareTransactions(t *testing.T) {
	const n = 600
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	var wg sync.WaitGroup
	firsts := make([]int, n)
	var mu sync.Mutex
	for i := range n {
		for range 2 { // each event twice at the same moment
			wg.Go(func() {
				r, err := s.Record(ctx, scoreVerdict(uint64(i+1), fmt.Sprint("event-", i)))
				if err != nil {
					t.Error(err)
					return
				}
				if r.First {
					mu.Lock()
					firsts[i]++
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	for i, f := range firsts {
		if f != 1 {
			t.Errorf("event %d was first %d times", i, f)
		}
	}
	if got := count(t, conn, `SELECT count(*) FROM decuwatch.scores`); got != n {
		t.Errorf("%d scores, want %d", got, n)
	}
	if got := count(t, conn, `SELECT sum(n) FROM decuwatch_views.class_risk_hourly`); got != n {
		t.Errorf("the rollup counts %d, want %d", got, n)
	}
	// Each transaction adds one row for the class and hour: fewer than events shows that calls were coalesced.
	if got := count(t, conn, `SELECT count(*) FROM decuwatch.class_hour_parts`); got >= n {
		t.Errorf("%d transactions for %d events", got, n)
	}
	if err := s.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	if got := count(t, conn, `SELECT count(*) FROM decuwatch.class_hour_parts`); got != 1 {
		t.Errorf("%d rows after folding", got)
	}
	if got := count(t, conn, `SELECT n FROM decuwatch_views.class_risk_daily WHERE abs(request_risk_mean - 0.1) < 1e-12
		AND class_gap_min = 0.2`); got != n {
		t.Errorf("the daily rollup counts %d, want %d", got, n)
	}
	if got := count(t, conn, `SELECT n FROM decuwatch_views.class_risk_hourly WHERE abs(class_gap_mean - 0.2) < 1e-12
		AND class_gap_sd < 1e-6`); got != n {
		t.Errorf("the folded rollup counts %d, want %d", got, n)
	}
}

func TestBadVerdictLeavesItsNeighbours(t *testing.T) {
	s, conn := open(t, postgres.Config{Committers: 1})
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			v := scoreVerdict(uint64(i+1), fmt.Sprint("event-", i))
			bad := i%20 == 7
			if bad {
				v.Score.Receipt.Settings = "" // a constraint refuses it
			}
			_, err := s.Record(ctx, v)
			if bad != (err != nil) {
				t.Errorf("event %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.scores`); n != 57 {
		t.Errorf("%d scores, want 57", n)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.events`); n != 57 {
		t.Errorf("%d rows in the ledger, want 57", n)
	}
}

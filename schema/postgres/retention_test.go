package postgres_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
)

const day = 24 * time.Hour

// aged lists the tables that retention empties, with the column that says how old a row is and the kind it belongs to.
var aged = [][3]string{
	{"evidence", "made_at", "evidence"}, {"outbox", "delivered_at", "deliveries"}, {"reviews", "opened_at", "alerts"},
	{"alerts", "recorded_at", "alerts"}, {"canaries", "published_at", "alerts"}, {"events", "recorded_at", "events"},
	{"skips", "recorded_at", "events"}, {"repeats", "recorded_at", "events"}, {"tries", "tried_at",
		"events"}, {"dead_letters", "recorded_at", "events"}, {"class_hour_parts", "hour", "rollups"},
	{"class_day_parts", "day", "rollups"}, {"outcome_hour_parts", "hour", "rollups"},
}

// sudo runs statements of a superuser; triggers, which keep history from being changed, are off.
func sudo(t testing.TB, conn *pgx.Conn, statements ...string) {
	t.Helper()
	for _, sql := range append([]string{`SET session_replication_role = replica`}, statements...) {
		if _, err := conn.Exec(testContext(t), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
}

// fill writes at least one row into every table that retention empties, with events at a time.
func fill(t testing.TB, s *postgres.Store, conn *pgx.Conn, when time.Time) {
	t.Helper()
	ctx := testContext(t)
	v := scoreVerdict(1, "one")
	v.Score.Event.Time = when
	v.Alerts = []schema.Alert{alert(v.Score, "a")}
	mustRecord(t, s, v)
	skipped := event("two")
	skipped.Time = when
	mustRecord(t, s, schema.Verdict{Delivery: delivery(2, "two"), Skip: &schema.Skip{Event: skipped, Reason: "noise"}})
	mustRecord(t, s, schema.Verdict{Delivery: delivery(3, "x"),
		DeadLetter: &schema.DeadLetter{Kind: "invalid", Reason: "r", Payload: []byte("{")}})
	if err := s.AddCanary(ctx, postgres.Canary{Source: "canary", EventID: "c", Model: "fashion-mnist"}); err != nil {
		t.Fatal(err)
	}
	messages, err := s.OutboxNext(ctx, schema.SinkStream, 10, time.Minute)
	if err != nil || len(messages) != 1 {
		t.Fatalf("%d messages, %v", len(messages), err)
	}
	if err := s.OutboxDelivered(ctx, []int64{messages[0].ID}); err != nil {
		t.Fatal(err)
	}
	sudo(t, conn, `INSERT INTO decuwatch.evidence (review_id, name, content_type, body)
		VALUES ('a', 'map', 'image/png', '')`,
		`INSERT INTO decuwatch.tries (stream, sequence, digest) VALUES ('s', 4, repeat('0', 64))`,
		`INSERT INTO decuwatch.repeats (stream, sequence, digest, source, event_id, delivered)
			VALUES ('s', 5, repeat('0', 64), 's', 'one', 1)`)
}

// rows counts the rows of every table that retention empties, and of scores.
func rows(t testing.TB, conn *pgx.Conn) map[string]int {
	t.Helper()
	counts := map[string]int{"scores": count(t, conn, `SELECT count(*) FROM decuwatch.scores`)}
	for _, table := range aged {
		counts[table[0]] = count(t, conn, `SELECT count(*) FROM decuwatch.`+table[0])
	}
	return counts
}

// TestRetentionUsesTheServersClock runs maintenance from a process whose clock is 500 days ahead of the server's:
// longer than every retention. Nothing goes, whether the rows were written before or are written now.
func TestRetentionUsesTheServersClock(t *testing.T) {
	libraries, _ := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1") // the pattern is well-formed
	unpacked, _ := filepath.Glob("../../.tools/*/usr/lib/*/faketime/libfaketime.so.1")
	libraries = append(libraries, unpacked...)
	if len(libraries) == 0 {
		t.Fatal("libfaketime is not installed (run: make setup)")
	}
	library, err := filepath.Abs(libraries[0])
	if err != nil {
		t.Fatal(err)
	}
	// Go does not read its clock through libc: the variables change the server's clock only.
	t.Setenv("LD_PRELOAD", library)
	t.Setenv("FAKETIME", "-500d")
	t.Setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
	ctx := testContext(t)
	server, err := local.Start(ctx, local.Options{Dir: filepath.Join(t.TempDir(), "server"), Remove: true,
		Settings: map[string]string{"fsync": "off"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := os.Unsetenv("LD_PRELOAD"); err != nil {
		t.Fatal(err)
	}
	if err := postgres.Migrate(ctx, server.URL()); err != nil {
		t.Fatal(err)
	}
	conn := connect(t, server.URL())
	var now time.Time
	if err := conn.QueryRow(ctx, `SELECT now()`).Scan(&now); err != nil {
		t.Fatal(err)
	}
	if ahead := time.Since(now); ahead < 499*day {
		t.Fatalf("the server's clock is only %s behind", ahead)
	}
	// Retentions that 500 days exceed; rollups keep longer by default.
	s, err := postgres.Open(ctx, postgres.Config{URL: server.URL(),
		Maintenance: postgres.Maintenance{Alerts: 400 * day, Rollups: 400 * day}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	fill(t, s, conn, now.Add(-48*time.Hour).UTC().Truncate(time.Microsecond))
	before := rows(t, conn)
	if err := s.MaintainOnce(ctx); err != nil {
		t.Fatal(err)
	}
	for table, n := range rows(t, conn) {
		if n == 0 || n != before[table] {
			t.Errorf("%s has %d rows after maintenance, had %d", table, n, before[table])
		}
	}
	month := now.UTC().AddDate(0, 0, 1-now.UTC().Day()).Format("scores_2006_01")
	if partitions := partitions(t, conn); !slices.Contains(partitions, month) || len(partitions) > 4 {
		t.Errorf("partitions %v, want the server's present month and two after it", partitions)
	}
	// What Postgres' clock calls due is due: a job that failed waits, and a canary is open until its time is over.
	if open, err := s.OpenCanaries(ctx); err != nil || len(open) != 1 {
		t.Errorf("%d canaries are to be closed, %v", len(open), err)
	}
	soon := postgres.Canary{Source: "canary", EventID: "soon", Model: "fashion-mnist", PublishedAt: time.Now(),
		DueAt: time.Now().Add(time.Hour)}
	if err := s.AddCanary(ctx, soon); err != nil {
		t.Fatal(err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.canaries WHERE due_at BETWEEN now() + interval '50 minutes'
		AND now() + interval '70 minutes'`); n != 1 {
		t.Error("a canary of the next hour is not due in an hour on the server's clock")
	}
	late := scoreVerdict(7, "late")
	late.Score.Event.Time = now.UTC().Truncate(time.Microsecond)
	late.Alerts = []schema.Alert{alert(late.Score, "late")}
	mustRecord(t, s, late)
	due, err := s.OutboxNext(ctx, schema.SinkStream, 1, time.Minute)
	if err != nil || len(due) != 1 {
		t.Fatalf("%d messages are due, %v", len(due), err)
	}
	if err := s.OutboxFailed(ctx, due[0].ID, "why", time.Hour); err != nil {
		t.Fatal(err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.outbox
		WHERE next_attempt_at BETWEEN now() + interval '50 minutes' AND now() + interval '70 minutes'`); n != 1 {
		t.Error("a delivery that waits for an hour is not due in an hour on the server's clock")
	}
	job, found, err := s.NextEvidence(ctx, []string{ensembleDigest}, time.Minute)
	if err != nil || !found {
		t.Fatalf("%t, %v", found, err)
	}
	if err := s.FailEvidence(ctx, job, "why", time.Hour, false); err != nil {
		t.Fatal(err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.evidence_jobs
		WHERE next_attempt_at BETWEEN now() + interval '50 minutes' AND now() + interval '70 minutes'`); n != 1 {
		t.Error("a job that waits for an hour is not due in an hour on the server's clock")
	}
}

func partitions(t testing.TB, conn *pgx.Conn) []string {
	t.Helper()
	return list(t, conn, `SELECT c.relname::text FROM pg_catalog.pg_inherits i
		JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
		WHERE inhparent = 'decuwatch.scores'::regclass ORDER BY 1`)
}

// TestRetention ages the rows of each table to either side of its retention.
func TestRetention(t *testing.T) {
	m := postgres.Maintenance{Scores: 60 * day, Alerts: 50 * day, Events: 40 * day, Evidence: 2 * time.Hour,
		Deliveries: 3 * day, Rollups: 70 * day}
	s, conn := open(t, postgres.Config{Maintenance: m})
	ctx := testContext(t)
	fill(t, s, conn, at)
	if err := s.EnsurePartitions(ctx, 3); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		now := time.Now().UTC()
		month := time.Date(now.Year(), now.Month()+time.Month(i), 1, 0, 0, 0, 0, time.UTC).Format("scores_2006_01")
		if !slices.Contains(partitions(t, conn), month) {
			t.Errorf("no partition %s in %v", month, partitions(t, conn))
		}
	}
	keeps := map[string]time.Duration{}
	for _, r := range settings.WithDefaults(m).Retentions() {
		keeps[r.Kind] = r.Keep
	}
	for _, table := range aged {
		name, column, keep := table[0], table[1], keeps[table[2]]
		for _, c := range []struct {
			age  time.Duration
			stay bool
		}{{keep - time.Minute, true}, {keep + time.Minute, false}} {
			sudo(t, conn, fmt.Sprintf(`UPDATE decuwatch.%s SET %s = now() - interval '%d seconds'`, name, column,
				int(c.age.Seconds())))
			if err := s.MaintainOnce(ctx); err != nil {
				t.Fatal(err)
			}
			if n := count(t, conn, `SELECT count(*) FROM decuwatch.`+name); (n > 0) != c.stay {
				t.Errorf("%s keeps %d rows of age %s; retention is %s", name, n, c.age, keep)
			}
		}
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.scores`); n != 1 {
		t.Errorf("%d scores, want the one that is two days old", n)
	}
}

// TestRetentionWorksInChunks deletes more rows than one call of the function does.
func TestRetentionWorksInChunks(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	sudo(t, conn, `INSERT INTO decuwatch.skips (source, event_id, event_time, model, class, reason, detail, labels,
		recorded_at)
		SELECT 's', i::text, now(), 'm', '1', 'noise', '', '{}', now() - interval '401 days'
		FROM generate_series(1, 25000) i`)
	var once int
	if err := conn.QueryRow(testContext(t),
		`SELECT decuwatch.delete_old('events', '400 days')`).Scan(&once); err != nil || once != 10000 {
		t.Errorf("one call deleted %d rows, %v", once, err)
	}
	if err := s.MaintainOnce(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.skips`); n != 0 {
		t.Errorf("%d rows are left", n)
	}
}

// TestLeastRetention compares the shortest retentions in the database with the program's, and shows that no caller gets
// below them.
func TestLeastRetention(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	fill(t, s, conn, at)
	sudo(t, conn, `UPDATE decuwatch.outbox SET delivered_at = now() - interval '1 day' + interval '1 minute'`,
		`UPDATE decuwatch.evidence SET made_at = now() - interval '1 hour' + interval '1 minute'`)
	before := rows(t, conn)
	for _, r := range settings.WithDefaults(postgres.Maintenance{}).Retentions() {
		call := fmt.Sprintf(`SELECT decuwatch.delete_old('%s', $1)`, r.Kind)
		if r.Kind == "scores" {
			call = `SELECT decuwatch.drop_old_scores($1)`
		}
		for _, keep := range []any{r.Least - time.Microsecond, time.Duration(0), -r.Least, nil} {
			if _, err := conn.Exec(testContext(t), call, keep); code(err) != "22023" {
				t.Errorf("%s for %v: %v, want a refusal", r.Kind, keep, err)
			}
		}
		if _, err := conn.Exec(testContext(t), call, r.Least); err != nil {
			t.Errorf("%s for %s: %v", r.Kind, r.Least, err)
		}
		short := settings.WithDefaults(postgres.Maintenance{})
		for _, field := range []*time.Duration{&short.Scores, &short.Alerts, &short.Events, &short.Evidence,
			&short.Deliveries, &short.Rollups} {
			long := *field
			*field = time.Minute
			if _, err := postgres.Open(testContext(t), postgres.Config{URL: "postgres://nowhere",
				Maintenance: short}); err == nil || !strings.Contains(err.Error(), "must be at least") {
				t.Errorf("opened with a retention of a minute: %v", err)
			}
			*field = long
		}
	}
	if _, err := conn.Exec(testContext(t), `SELECT decuwatch.delete_old('thresholds', '400 days')`); code(err) != "22023" {
		t.Errorf("a kind that has no retention: %v", err)
	}
	for table, n := range rows(t, conn) {
		if n != before[table] {
			t.Errorf("%s has %d rows, had %d", table, n, before[table])
		}
	}
}

// code returns the SQLSTATE of an error.
func code(err error) string {
	var e interface{ SQLState() string }
	if errors.As(err, &e) {
		return e.SQLState()
	}
	return ""
}

// TestEventsOlderThanScoresAreKept refuses what retention would drop, at every place where it may be noticed.
func TestEventsOlderThanScoresAreKept(t *testing.T) {
	s, conn := open(t, postgres.Config{Maintenance: postgres.Maintenance{Scores: 30 * day}})
	ctx := testContext(t)
	var invalid *schema.Invalid
	record := func(id string, age time.Duration) error {
		v := scoreVerdict(1, id)
		v.Score.Event.Time = time.Now().UTC().Add(-age).Truncate(time.Microsecond)
		_, err := s.Record(ctx, v)
		return err
	}
	for id, age := range map[string]time.Duration{"year": 366 * day, "day": 31 * day, "minute": 30*day + time.Minute} {
		err := record(id, age)
		if !errors.As(err, &invalid) || invalid.Field != "time" || !strings.Contains(invalid.Reason, "30 days") ||
			!postgres.Refused(err) {
			t.Errorf("an event that is %s old: %v, want Invalid on time with the bound", age, err)
		}
	}
	if n := len(partitions(t, conn)); n != 0 {
		t.Errorf("%d partitions were made for events that are refused", n)
	}
	if err := record("young", 30*day-time.Minute); err != nil {
		t.Fatal(err)
	}
	// The month's partition is there now; the age still decides.
	if err := record("old", 30*day+time.Second); !errors.As(err, &invalid) || invalid.Field != "time" {
		t.Errorf("an old event of a month that has a partition: %v", err)
	}
	if err := s.MaintainOnce(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ScoreByID(ctx, schema.Identity{ID: "young"}); err != nil {
		t.Errorf("the score was dropped right after it was written: %v", err)
	}
	// Before any work, by the stream's time.
	stored := time.Now().Add(-500 * day)
	if err := s.CheckAge(stored.Add(-30*day-time.Second), stored); !errors.As(err, &invalid) || invalid.Field != "time" {
		t.Errorf("an old event: %v, want Invalid on time", err)
	}
	for _, accepted := range []error{s.CheckAge(stored.Add(-29*day), stored),
		s.CheckAge(stored.Add(-500*day), time.Time{})} {
		if accepted != nil {
			t.Error(accepted)
		}
	}
	// It becomes a dead letter, and a query for the score says so.
	old := event("old")
	old.Time = time.Now().UTC().Add(-31 * day).Truncate(time.Microsecond)
	mustRecord(t, s, schema.Verdict{Delivery: delivery(1, "old"),
		DeadLetter: &schema.DeadLetter{Event: &old, Kind: "invalid", Field: "time", Reason: invalid.Reason}})
	if _, err := s.ScoreByID(ctx, schema.Identity{ID: "old"}); !errors.Is(err, postgres.ErrNotFound) ||
		!strings.Contains(err.Error(), "dead_letter (invalid: time ") {
		t.Errorf("%v, want the verdict", err)
	}
	for _, year := range []int{1970, 2200} {
		v := scoreVerdict(5, "far")
		v.Score.Event.Time = time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC)
		if _, err := s.Record(ctx, v); !errors.As(err, &invalid) || invalid.Field != "time" {
			t.Errorf("year %d: got %v, want Invalid on time", year, err)
		}
	}
	next := scoreVerdict(6, "next year")
	next.Score.Event.Time = time.Now().UTC().AddDate(1, 2, 0).Truncate(time.Microsecond)
	if _, err := s.Record(ctx, next); !errors.As(err, &invalid) || invalid.Field != "time" {
		t.Errorf("an event of next year: %v, want Invalid on time", err)
	}
}

// TestDroppedPartitions drops a month of scores: the ledger keeps the verdict, and neighbors of an event whose
// partition is gone are written.
func TestDroppedPartitions(t *testing.T) {
	s, conn := open(t, postgres.Config{Committers: 1})
	ctx := testContext(t)
	late := func(sequence uint64, id string) schema.Verdict {
		v := scoreVerdict(sequence, id)
		v.Score.Event.Time = time.Now().UTC().AddDate(0, -4, 0).Truncate(time.Microsecond)
		return v
	}
	old := late(1, "old")
	mustRecord(t, s, old)
	if dropped, err := s.DropOldScores(ctx, 400*day); err != nil || len(dropped) != 0 {
		t.Errorf("dropped %v, %v", dropped, err)
	}
	month := old.Score.Event.Time.Format("decuwatch.scores_2006_01")
	beside := old.Score.Event.Time.Format("decuwatch.rescores_2006_01")
	if dropped, err := s.DropOldScores(ctx, 60*day); err != nil || !slices.Equal(dropped, []string{beside, month}) {
		t.Errorf("dropped %v, %v", dropped, err)
	}
	if r := mustRecord(t, s, old); r.First || r.Outcome != "score" || r.Score != nil {
		t.Errorf("%+v", r)
	}
	mustRecord(t, s, late(2, "late"))
	sudo(t, conn, `DROP TABLE `+month) // as another monitor would, while this one believes in the partition
	mustRecord(t, s, late(3, "later"))
	sudo(t, conn, `DROP TABLE `+month)
	ancient := scoreVerdict(4, "ancient")
	ancient.Score.Event.Time = time.Now().UTC().AddDate(-3, 0, 0)
	errs := make(chan error, 3)
	for _, v := range []schema.Verdict{late(5, "latest"), scoreVerdict(6, "new"), ancient} {
		go func() { _, err := s.Record(ctx, v); errs <- err }()
	}
	refused := 0
	for range 3 {
		if err := <-errs; postgres.Refused(err) {
			refused++
		} else if err != nil {
			t.Error(err)
		}
	}
	if refused != 1 {
		t.Errorf("%d of three verdicts were refused, want the ancient event's", refused)
	}
}

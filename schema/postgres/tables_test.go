package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// objects lists what stands in a database, by kind and name.
const objects = `
	SELECT 'relation ' || c.oid::regclass FROM pg_catalog.pg_class c
	JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname LIKE 'decuwatch%'
	UNION ALL SELECT 'routine ' || p.oid::regprocedure FROM pg_catalog.pg_proc p
	JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname LIKE 'decuwatch%'
	UNION ALL SELECT 'type ' || t.oid::regtype FROM pg_catalog.pg_type t
	JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace WHERE n.nspname LIKE 'decuwatch%'
	UNION ALL SELECT 'constraint ' || conrelid::regclass || ' ' || pg_catalog.pg_get_constraintdef(k.oid)
	FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_namespace n ON n.oid = k.connamespace
		WHERE n.nspname LIKE 'decuwatch%' AND conrelid <> 0
	UNION ALL SELECT 'grant ' || table_schema || '.' || table_name || ' ' || grantee || ' ' || privilege_type
	FROM information_schema.role_table_grants WHERE table_schema LIKE 'decuwatch%'
	UNION ALL SELECT 'schema ' || nspname FROM pg_catalog.pg_namespace WHERE nspname LIKE 'decuwatch%'
	ORDER BY 1`

func list(t testing.TB, conn *pgx.Conn, query string, args ...any) []string {
	t.Helper()
	rows, err := conn.Query(testContext(t), query, args...)
	if err != nil {
		t.Fatal(err)
	}
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestMigrateUpDownUp(t *testing.T) {
	url := pgtest.EmptyURL(t)
	ctx := testContext(t)
	conn := connect(t, url)
	if _, err := postgres.Open(ctx, postgres.Config{URL: url}); !errors.Is(err, postgres.ErrNotMigrated) {
		t.Fatalf("opened an empty database: %v", err)
	}
	// Replicas that start together: one migrates, the others wait.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := postgres.Migrate(ctx, url); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	up := list(t, conn, objects)
	if len(up) < 100 {
		t.Fatalf("only %d objects after the migration", len(up))
	}
	s, err := postgres.Open(ctx, postgres.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	mustRecord(t, s, scoreVerdict(1, "one"))
	s.Close()
	if err := postgres.MigrateDown(ctx, url); err != nil {
		t.Fatal(err)
	}
	for _, left := range list(t, conn, objects) {
		if !strings.Contains(left, "decuwatch.migrations") && left != "schema decuwatch" {
			t.Errorf("left after the migration down: %s", left)
		}
	}
	current, newest, err := postgres.Version(ctx, url)
	if err != nil || current != 0 || newest < 3 {
		t.Errorf("version %d of %d, %v", current, newest, err)
	}
	if err := postgres.Migrate(ctx, url); err != nil {
		t.Fatal(err)
	}
	if again := list(t, conn, objects); !reflect.DeepEqual(up, again) {
		t.Errorf("up, down, up differs from up:\n%v\n%v", up, again)
	}
	if err := postgres.Migrate(ctx, url); err != nil {
		t.Errorf("a migration with nothing to do: %v", err)
	}
}

func TestEverythingIsCommented(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	mustRecord(t, s, scoreVerdict(1, "one")) // a partition exists
	bare := list(t, conn, `
		SELECT c.oid::regclass || '.' || a.attname FROM pg_catalog.pg_attribute a
		JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname LIKE 'decuwatch%' AND c.relkind IN ('r', 'p', 'v') AND a.attnum > 0 AND NOT a.attisdropped
		AND pg_catalog.col_description(c.oid, a.attnum) IS NULL
		UNION ALL
		SELECT c.oid::regclass::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname LIKE 'decuwatch%' AND c.relkind IN ('r', 'p', 'v')
		AND pg_catalog.obj_description(c.oid, 'pg_class') IS NULL
		UNION ALL
		SELECT nspname::text FROM pg_catalog.pg_namespace n WHERE nspname LIKE 'decuwatch%'
		AND pg_catalog.obj_description(n.oid, 'pg_namespace') IS NULL
		UNION ALL
		SELECT p.oid::regprocedure::text FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
		WHERE n.nspname LIKE 'decuwatch%' AND pg_catalog.obj_description(p.oid, 'pg_proc') IS NULL
		UNION ALL
		SELECT t.oid::regtype::text FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
		WHERE n.nspname LIKE 'decuwatch%' AND t.typtype = 'd' AND pg_catalog.obj_description(t.oid, 'pg_type') IS NULL`)
	for _, name := range bare {
		t.Errorf("%s has no comment", name)
	}
	if n := count(t, conn, `SELECT count(*)
		FROM pg_catalog.pg_description d JOIN pg_catalog.pg_class c ON c.oid = d.objoid
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname LIKE 'decuwatch%'`); n < 200 {
		t.Errorf("only %d comments", n)
	}
}

func TestHistoryIsAppendOnly(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	v := scoreVerdict(1, "one")
	v.Alerts = []schema.Alert{alert(v.Score, "a")}
	mustRecord(t, s, v)
	mustRecord(t, s, schema.Verdict{Delivery: delivery(2, "two"),
		Skip: &schema.Skip{Event: event("two"), Reason: "noise"}})
	mustRecord(t, s, schema.Verdict{Delivery: delivery(3, "x"),
		DeadLetter: &schema.DeadLetter{Kind: "invalid", Reason: "r"}})
	if _, err := s.SetThreshold(testContext(t), threshold(0.1)); err != nil {
		t.Fatal(err)
	}
	for table, column := range map[string]string{"events": "reason", "scores": "class_label", "skips": "detail",
		"dead_letters": "reason", "alerts": "detail", "thresholds": "reason", "threshold_changes": "reason"} {
		if _, err := conn.Exec(testContext(t), fmt.Sprintf(`UPDATE decuwatch.%s SET %s = 'changed'`, table,
			column)); err == nil || !strings.Contains(err.Error(), "append-only") {
			t.Errorf("%s was updated: %v", table, err)
		}
	}
}

func TestRoles(t *testing.T) {
	url := pgtest.URL(t)
	conn := connect(t, url)
	ctx := testContext(t)
	for _, role := range []string{"reader", "writer"} {
		for _, sql := range []string{`DROP ROLE IF EXISTS test_` + role,
			`CREATE ROLE test_` + role + ` LOGIN PASSWORD 'secret' IN ROLE decuwatch_` + role} {
			if _, err := conn.Exec(ctx, sql); err != nil {
				t.Fatal(err)
			}
		}
	}
	// The monitor works as the writer, partitions and retention included.
	s, err := postgres.Open(ctx, postgres.Config{URL: pgtest.As(t, url, "test_writer", "secret")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	v := scoreVerdict(1, "one")
	v.Alerts = []schema.Alert{alert(v.Score, "a")}
	mustRecord(t, s, v)
	mustRecord(t, s, schema.Verdict{Delivery: delivery(2, "two"),
		Skip: &schema.Skip{Event: event("two"), Reason: "noise"}})
	mustRecord(t, s, schema.Verdict{Delivery: delivery(3, "x"),
		DeadLetter: &schema.DeadLetter{Kind: "invalid", Reason: "r"}})
	if _, err := s.SetThreshold(ctx, threshold(0.1)); err != nil {
		t.Error(err)
	}
	if _, err := s.RollbackThresholds(ctx, "me", "why"); err != nil {
		t.Error(err)
	}
	messages, err := s.OutboxNext(ctx, schema.SinkStream, 10, time.Minute)
	if err != nil || len(messages) != 1 {
		t.Fatalf("%d messages, %v", len(messages), err)
	}
	if err := s.OutboxDelivered(ctx, []int64{messages[0].ID}); err != nil {
		t.Error(err)
	}
	if err := s.MaintainOnce(ctx); err != nil {
		t.Error(err)
	}
	writer := connect(t, pgtest.As(t, url, "test_writer", "secret"))
	for _, sql := range []string{`DROP TABLE decuwatch.scores`, `DELETE FROM decuwatch.scores`,
		`UPDATE decuwatch.alerts SET detail = ''`, `CREATE TABLE decuwatch.x (i integer)`} {
		if _, err := writer.Exec(ctx, sql); !denied(err) {
			t.Errorf("writer may: %s: %v", sql, err)
		}
	}

	reader := connect(t, pgtest.As(t, url, "test_reader", "secret"))
	tables := list(t, conn, `SELECT c.oid::regclass::text FROM pg_catalog.pg_class c
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'decuwatch' AND relkind IN ('r', 'p')`)
	if len(tables) < 15 {
		t.Fatalf("only %d tables", len(tables))
	}
	for _, table := range tables {
		for _, sql := range []string{"SELECT 1 FROM " + table, "DELETE FROM " + table, "TRUNCATE " + table} {
			if _, err := reader.Exec(ctx, sql); !denied(err) {
				t.Errorf("reader may: %s: %v", sql, err)
			}
		}
	}
	views := list(t, conn, `SELECT table_name::text FROM information_schema.views WHERE table_schema = 'decuwatch_views'
		ORDER BY 1`)
	for _, name := range []string{"scores", "class_risk_hourly", "alerts", "thresholds_now", "dead_letters",
		"coverage", "production_scores", "production_alerts"} {
		if !slices.Contains(views, name) {
			t.Errorf("there is no view %s", name)
		}
	}
	for _, view := range views {
		if _, err := reader.Exec(ctx, "SELECT * FROM decuwatch_views."+view); err != nil {
			t.Errorf("reader may not read view %s: %v", view, err)
		}
		if _, err := reader.Exec(ctx, "DELETE FROM decuwatch_views."+view); err == nil {
			t.Errorf("reader may delete from view %s", view)
		}
	}
	for _, sql := range []string{`SELECT decuwatch.drop_old_scores('400 days')`,
		`SELECT decuwatch.delete_old('events',
			'400 days')`, `SELECT decuwatch.fold()`, `SELECT decuwatch.ensure_partition(now())`,
		`CREATE TABLE decuwatch_views.x (i integer)`} {
		if _, err := reader.Exec(ctx, sql); !denied(err) {
			t.Errorf("reader may: %s: %v", sql, err)
		}
	}
	s.Close()
	writer.Close(ctx)
	reader.Close(ctx)
	if _, err := conn.Exec(ctx, `DROP ROLE test_reader; DROP ROLE test_writer`); err != nil {
		t.Error(err)
	}
}

// TestMigrateAsOwner migrates as a user who owns the database and may create roles, and is no superuser.
func TestMigrateAsOwner(t *testing.T) {
	url := pgtest.EmptyURL(t)
	conn := connect(t, url)
	ctx := testContext(t)
	var database string
	if err := conn.QueryRow(ctx, `SELECT current_database()`).Scan(&database); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{`CREATE ROLE test_owner LOGIN CREATEROLE PASSWORD 'secret'`,
		`ALTER DATABASE ` + pgx.Identifier{database}.Sanitize() + ` OWNER TO test_owner`} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	owner := pgtest.As(t, url, "test_owner", "secret")
	if err := postgres.Migrate(ctx, owner); err != nil {
		t.Fatal(err)
	}
	s, err := postgres.Open(ctx, postgres.Config{URL: owner})
	if err != nil {
		t.Fatal(err)
	}
	mustRecord(t, s, scoreVerdict(1, "one"))
	s.Close()
	if err := postgres.MigrateDown(ctx, owner); err != nil {
		t.Error(err)
	}
}

func denied(err error) bool {
	var e interface{ SQLState() string }
	return errors.As(err, &e) && e.SQLState() == "42501"
}

func TestOutbox(t *testing.T) {
	s, _ := open(t, postgres.Config{Sinks: []schema.Sink{"nats", "webhook"}})
	ctx := testContext(t)
	v := scoreVerdict(1, "one")
	v.Alerts = []schema.Alert{alert(v.Score, "a1"), alert(v.Score, "a2")}
	mustRecord(t, s, v)
	got, err := s.OutboxNext(ctx, "nats", 10, time.Hour)
	if err != nil || len(got) != 2 || got[0].AlertID != "a1" ||
		got[0].Subject != "uncertainty.alert.fashion-mnist.warn.1" || got[0].Header["Nats-Msg-Id"][0] != "a1" {
		t.Fatalf("%+v %v", got, err)
	}
	a, err := schema.DecodeAlert(got[0].Body)
	if err != nil || !reflect.DeepEqual(a, v.Alerts[0]) {
		t.Errorf("the alert changed on its way:\n got %+v\nwant %+v (%v)", a, v.Alerts[0], err)
	}
	stored, err := s.AlertByID(ctx, "a1")
	if err != nil || !reflect.DeepEqual(stored, v.Alerts[0]) {
		t.Errorf("the alert changed in its table:\n got %+v\nwant %+v (%v)", stored, v.Alerts[0], err)
	}
	if got, err := s.OutboxNext(ctx, "nats", 10, time.Hour); err != nil || len(got) != 0 {
		t.Errorf("leased messages were given again: %+v %v", got, err)
	}
	if err := s.OutboxFailed(ctx, got[1].ID, "no \x00 answer", -time.Second); err != nil {
		t.Fatal(err)
	}
	if err := s.OutboxDelivered(ctx, []int64{got[0].ID}); err != nil {
		t.Fatal(err)
	}
	again, err := s.OutboxNext(ctx, "nats", 10, time.Hour)
	if err != nil || len(again) != 1 || again[0].ID != got[1].ID || again[0].Attempts != 1 {
		t.Fatalf("%+v %v", again, err)
	}
	stats, err := s.OutboxStats(ctx)
	if err != nil || len(stats) != 2 || stats[0].Sink != "nats" || stats[0].Pending != 1 || stats[1].Pending != 2 ||
		stats[1].Oldest <= 0 {
		t.Errorf("%+v %v", stats, err)
	}
	alerts, err := s.Alerts(ctx, postgres.AlertFilter{Model: "fashion-mnist", Severity: "warn"})
	if err != nil || len(alerts) != 2 {
		t.Errorf("%d alerts, %v", len(alerts), err)
	}
	if alerts, err := s.Alerts(ctx, postgres.AlertFilter{Severity: "critical"}); err != nil || len(alerts) != 0 {
		t.Errorf("%d critical alerts, %v", len(alerts), err)
	}
	if _, err := s.AlertByID(ctx, "nobody"); !errors.Is(err, postgres.ErrNotFound) {
		t.Errorf("an unknown alert: %v", err)
	}
	summary := schema.Alert{ID: "s1", Kind: "summary", Model: "fashion-mnist", ClassIndex: -1, Severity: "warn",
		Reason: "budget", Count: 17, EventTime: at, FiredAt: at}
	for i := range 2 {
		if first, err := s.RaiseAlert(ctx, summary); err != nil || first != (i == 0) {
			t.Errorf("summary, call %d: %t %v", i, first, err)
		}
	}
	if got, err := s.OutboxNext(ctx, "webhook", 10, time.Hour); err != nil || len(got) != 3 ||
		got[2].Subject != "uncertainty.alert.fashion-mnist.warn.all" {
		t.Errorf("%+v %v", got, err)
	}
}

func threshold(value float64) schema.Threshold {
	class, alpha := 1, 0.01
	return schema.Threshold{
		Model: "fashion-mnist", EnsembleDigest: ensembleDigest, Settings: seriesSettings, Measurement: schema.ClassGap,
		Scope: "class", Class: &class, Severity: schema.SeverityWarn, Value: value, Origin: "calibrated", N: 200,
		Alpha: &alpha, SetBy: "ada", Reason: "first",
	}
}

func TestThresholds(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	values := func() (values []float64) {
		t.Helper()
		now, err := s.Thresholds(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, th := range now {
			values = append(values, th.Value)
		}
		return values
	}
	if _, err := s.RollbackThresholds(ctx, "ada", "nothing"); !errors.Is(err, postgres.ErrNotFound) {
		t.Errorf("rolled back nothing: %v", err)
	}
	set, err := s.SetThreshold(ctx, threshold(0.1))
	if err != nil || set.ID == 0 || set.SetAt.IsZero() {
		t.Fatalf("%+v %v", set, err)
	}
	now, err := s.Thresholds(ctx)
	if err != nil || len(now) != 1 || !reflect.DeepEqual(now[0], set) {
		t.Fatalf("stored:\n got %+v\nwant %+v (%v)", now, set, err)
	}
	model := threshold(0.5)
	model.Scope, model.Class = "model", nil
	if _, err := s.SetThresholds(ctx, postgres.ThresholdChange{Kind: postgres.ChangeCalibration, SetBy: "bob",
		Reason: "week 12", Thresholds: []schema.Threshold{threshold(0.2), model}}); err != nil {
		t.Fatal(err)
	}
	if got := values(); !reflect.DeepEqual(got, []float64{0.2, 0.5}) {
		t.Errorf("after the second change: %v", got)
	}
	back, err := s.RollbackThresholds(ctx, "eve", "too many alerts")
	if err != nil || back.Kind != postgres.ChangeRollback {
		t.Fatalf("%+v %v", back, err)
	}
	if got := values(); !reflect.DeepEqual(got, []float64{0.1}) {
		t.Errorf("after the rollback: %v", got)
	}
	if _, err := s.RollbackThresholds(ctx, "eve", "all"); err != nil {
		t.Fatal(err)
	}
	if got := values(); got != nil {
		t.Errorf("after the second rollback: %v", got)
	}
	history, err := s.ThresholdHistory(ctx, "fashion-mnist", 10)
	if err != nil || len(history) != 4 || history[1].SetBy != "eve" || history[1].Undoes != history[2].ID ||
		len(history[2].Thresholds) != 2 || history[3].Thresholds[0].Value != 0.1 {
		t.Errorf("%+v %v", history, err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.thresholds`); n != 6 {
		t.Errorf("%d rows, want 6: history is kept", n)
	}
	bad := threshold(0.1)
	bad.Class = nil
	if _, err := s.SetThreshold(ctx, bad); err == nil {
		t.Error("a class threshold without a class was taken")
	}
	alpha := 1.5
	bad = threshold(0.1)
	bad.Alpha = &alpha
	if _, err := s.SetThreshold(ctx, bad); err == nil {
		t.Error("an alpha of 1.5 was taken")
	}
}

func TestListen(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx, cancel := context.WithCancel(testContext(t))
	notified := make(chan struct{}, 100)
	ended := make(chan error)
	go func() { ended <- s.Listen(ctx, postgres.ChannelThresholds, func() { notified <- struct{}{} }) }()
	wait := func(what string) {
		t.Helper()
		select {
		case <-notified:
		case <-ctx.Done():
			t.Fatalf("no notification %s", what)
		}
	}
	wait("that it listens")
	if _, err := s.SetThreshold(ctx, threshold(0.1)); err != nil {
		t.Fatal(err)
	}
	wait("of the change")
	// A lost connection is made again, and notifies once for what was missed.
	if _, err := conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
		WHERE datname = current_database() AND query LIKE 'LISTEN%'`); err != nil {
		t.Fatal(err)
	}
	wait("after the connection was cut")
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestServerKilled kills the server in the middle of work: what was confirmed is still there, and work goes on.
func TestServerKilled(t *testing.T) {
	ctx := testContext(t)
	dir := filepath.Join(t.TempDir(), "server") // below a directory that is closed to other users
	server, err := local.Start(ctx, local.Options{Dir: dir, Remove: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { server.Stop() }()
	if err := postgres.Migrate(ctx, server.URL()); err != nil {
		t.Fatal(err)
	}
	s, err := postgres.Open(ctx, postgres.Config{URL: server.URL()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const n = 200
	confirmed := make([]bool, n)
	failed := make(chan struct{}, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			for ctx.Err() == nil { // as redelivery would
				_, err := s.Record(ctx, scoreVerdict(uint64(i+1), fmt.Sprint("event-", i)))
				if err == nil {
					confirmed[i] = true
					return
				}
				failed <- struct{}{}
				select {
				case <-time.After(50 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
		if i == n/2 {
			server.Kill()
			go func() {
				for range failed { // keeps the channel from filling
				}
			}()
			again, err := local.Start(ctx, local.Options{Dir: dir, Port: server.Port(), Remove: true})
			if err != nil {
				t.Fatal(err)
			}
			server = again
		}
	}
	wg.Wait()
	close(failed)
	conn := connect(t, server.URL())
	for i, ok := range confirmed {
		if !ok {
			t.Errorf("event %d was never confirmed", i)
		}
	}
	for _, table := range []string{"events", "scores"} {
		if got := count(t, conn, `SELECT count(*) FROM decuwatch.`+table); got != n {
			t.Errorf("%d rows in %s, want %d", got, table, n)
		}
	}
	if got := count(t, conn, `SELECT sum(n) FROM decuwatch_views.coverage`); got != n {
		t.Errorf("coverage counts %d, want %d", got, n)
	}
	conn.Close(ctx)
}

func TestCommitTimeoutNamesTheOperation(t *testing.T) {
	s, conn := open(t, postgres.Config{CommitTimeout: 100 * time.Millisecond})
	ctx := testContext(t)
	if err := s.EnsurePartitions(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, `SELECT decuwatch.ensure_partition($1)`, at); err != nil {
		t.Fatal(err)
	}
	tx, err := conn.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, `LOCK TABLE decuwatch.events`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Record(ctx, scoreVerdict(2, "two")); err == nil ||
		!strings.Contains(err.Error(), "commit of 1 verdicts timed out after 100ms") {
		t.Errorf("got %v", err)
	}
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	for ctx.Err() == nil {
		if _, err = s.Record(ctx, scoreVerdict(2, "two")); err == nil {
			return
		}
	}
	t.Errorf("the store did not recover: %v", err)
}

func TestClosed(t *testing.T) {
	s, _ := open(t, postgres.Config{})
	mustRecord(t, s, scoreVerdict(1, "one"))
	s.Close()
	if _, err := s.Record(testContext(t), schema.Verdict{Delivery: delivery(2, "x"),
		DeadLetter: &schema.DeadLetter{Kind: "invalid", Reason: "r"}}); !errors.Is(err, postgres.ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
}

// TestServerEndsWithItsParent starts a server in a child process, kills the child, and waits for the server's end.
func TestServerEndsWithItsParent(t *testing.T) {
	const child = "DECUWATCH_TEST_SERVER_DIR"
	ctx := testContext(t)
	if dir := os.Getenv(child); dir != "" {
		if _, err := local.Start(ctx, local.Options{Dir: dir, Remove: true}); err != nil {
			t.Fatal(err)
		}
		process, err := os.FindProcess(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		process.Kill()
		<-ctx.Done()
	}
	parent, err := os.MkdirTemp("", "pgparent")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(parent)
	if err := os.Chmod(parent, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(parent, "server")
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestServerEndsWithItsParent$")
	cmd.Env = append(os.Environ(), child+"="+dir)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("the child was not killed: %v: %s", err, out)
	}
	for {
		entries, err := os.ReadDir(parent)
		if err == nil && len(entries) == 0 {
			return
		}
		if _, err := os.Stat(filepath.Join(dir, "cluster", "postmaster.pid")); errors.Is(err, os.ErrNotExist) {
			if entries, _ := os.ReadDir(dir); len(entries) == 0 {
				return // only root may remove the directory itself, whose parent is root's
			}
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the server outlived its parent: %v", entries)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

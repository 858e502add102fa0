package deploy

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var question = regexp.MustCompile("(?s)\n## ([^\n]+\\?)\n(.*?)```sql\n(.*?)```")

// cookbook returns the questions of docs/sql.md and their queries.
func cookbook(t testing.TB) [][2]string {
	t.Helper()
	content, err := os.ReadFile("../docs/sql.md")
	if err != nil {
		t.Fatal(err)
	}
	found := question.FindAllStringSubmatch(string(content), -1)
	if len(found) < 12 || len(found) != strings.Count(string(content), "```sql") {
		t.Fatalf("docs/sql.md: %d questions, %d queries: each ## heading that asks must have one", len(found),
			strings.Count(string(content), "```sql"))
	}
	list := make([][2]string, len(found))
	for i, f := range found {
		list[i] = [2]string{f[1], strings.ReplaceAll(f[3], "'Bag'", "'class 8'")} // as the seeded class is called
	}
	return list
}

// TestCookbook runs each query of docs/sql.md as the reader on a seeded database: it returns rows.
func TestCookbook(t *testing.T) {
	conn := reader(t, seeded(t, 6000))
	for _, q := range cookbook(t) {
		rows, err := conn.Query(t.Context(), q[1])
		if err != nil {
			t.Errorf("%s: %v", q[0], err)
			continue
		}
		got, err := pgx.CollectRows(rows, pgx.RowToMap)
		if err != nil || len(got) == 0 {
			t.Errorf("%s: %d rows, %v", q[0], len(got), err)
			continue
		}
		for column := range got[0] {
			some := false
			for _, row := range got {
				some = some || row[column] != nil
			}
			if !some {
				t.Errorf("%s: %s is NULL in every row", q[0], column)
			}
		}
	}
}

// TestReaderCannotWrite shows that the queries' role reads views only.
func TestReaderCannotWrite(t *testing.T) {
	conn := reader(t, seeded(t, 100))
	for _, statement := range []string{
		`SELECT * FROM decuwatch.scores`, `DELETE FROM decuwatch_views.alerts`, `INSERT INTO decuwatch_views.skips (source)
			VALUES ('x')`,
		`UPDATE decuwatch_views.reviews SET state = 'resolved'`, `CREATE TABLE decuwatch_views.mine (i integer)`,
		`SELECT decuwatch.drop_old_scores('400 days')`,
	} {
		var refusal *pgconn.PgError
		_, err := conn.Exec(t.Context(), statement)
		// 42501 is "permission denied"; 55000 is "cannot change a view", which comes first.
		if !errors.As(err, &refusal) || refusal.Code != "42501" && refusal.Code != "55000" {
			t.Errorf("%s: %v, want a refusal", statement, err)
		}
	}
}

// BenchmarkRollups times questions on ten million rows of the hourly rollup: 1,000 classes over 10,000 hours. The rows
// lie class by class on disk, which is the worst order for a question about all classes: a block for each row.
func BenchmarkRollups(b *testing.B) {
	url := seeded(b, 1000)
	owner := connect(b, url)
	if _, err := owner.Exec(b.Context(), `
		INSERT INTO decuwatch.class_hour_parts (hour, model, ensemble_digest, settings, class_index, class_label, n,
			class_gap_sum, class_gap_squares, class_gap_min, class_gap_max,
			class_gap_saturated, request_risk_sum, request_risk_squares, request_risk_min, request_risk_max,
				request_risk_saturated, warnings, criticals, folded)
		SELECT date_trunc('hour', now()) - h * interval '1 hour', 'big', repeat('1', 64), 'seeded', c, 'class ' || c, 100,
			2.0 + c / 1000.0, 0.05, 0.01, 0.04, 0, 1, 0.02, 0.005, 0.03, 0, 1, 0, true
		FROM pg_catalog.generate_series(0, 999) c, pg_catalog.generate_series(1, 10000) h
		ORDER BY c, h DESC`); err != nil {
		b.Fatal(err)
	}
	if _, err := owner.Exec(b.Context(), `VACUUM ANALYZE decuwatch.class_hour_parts`); err != nil {
		b.Fatal(err)
	}
	conn := reader(b, url)
	for name, sql := range map[string]string{
		"one class, 416 days": `SELECT hour, class_gap_mean FROM decuwatch_views.class_risk_hourly
			WHERE model = 'big' AND class_index = 7 ORDER BY hour`,
		"all classes, 1 day": `SELECT class_label, sum(class_gap_mean * n) / sum(n)
			FROM decuwatch_views.class_risk_hourly WHERE model = 'big' AND hour >= now() - interval '1 day' GROUP BY 1
				ORDER BY 2 DESC LIMIT 20`,
		"all classes, 7 days": `SELECT class_label, sum(class_gap_mean * n) / sum(n)
			FROM decuwatch_views.class_risk_hourly WHERE model = 'big' AND hour >= now() - interval '7 days' GROUP BY 1
				ORDER BY 2 DESC LIMIT 20`,
		"one class, day by day, 90 days": `SELECT date_trunc('day', hour), sum(n) FROM decuwatch_views.class_risk_hourly
			WHERE model = 'big' AND class_index = 7 AND hour >= now() - interval '90 days' GROUP BY 1 ORDER BY 1`,
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := conn.Exec(b.Context(), sql); err != nil {
					b.Fatal(err)
				}
			}
			logPlan(b, conn, sql)
		})
	}
}

func logPlan(b *testing.B, conn *pgx.Conn, sql string) {
	b.Helper()
	if !testing.Verbose() {
		return
	}
	rows, err := conn.Query(b.Context(), "EXPLAIN (ANALYZE, BUFFERS, SUMMARY) "+sql)
	if err != nil {
		b.Fatal(err)
	}
	plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("%s", strings.Join(plan, "\n"))
}

// size logs what a million scores take on disk.
func size(b *testing.B, conn *pgx.Conn) {
	b.Helper()
	rows, err := conn.Query(b.Context(), `
		SELECT CASE WHEN relname LIKE 'scores\_%' THEN 'scores' ELSE relname END,
			sum(pg_catalog.pg_total_relation_size(oid))::bigint
		FROM pg_catalog.pg_class WHERE relnamespace = 'decuwatch'::pg_catalog.regnamespace AND relkind = 'r' GROUP BY 1
			ORDER BY 2 DESC LIMIT 5`)
	if err != nil {
		b.Fatal(err)
	}
	for rows.Next() {
		var name string
		var bytes int64
		if err := rows.Scan(&name, &bytes); err != nil {
			b.Fatal(err)
		}
		fmt.Printf("%s: %d MB\n", name, bytes>>20)
	}
	if rows.Err() != nil {
		b.Fatal(rows.Err())
	}
}

// A request with two alerts counts once: the tenants' query is held against counts over the tables themselves.
func TestTenantsCountRequests(t *testing.T) {
	url := seeded(t, 6000)
	owner := connect(t, url)
	if _, err := owner.Exec(t.Context(), `INSERT INTO decuwatch.alerts
		SELECT (json_populate_record(a, json_build_object('id', md5(a.id), 'measurement', 'request_risk'))).*
		FROM decuwatch.alerts a`); err != nil {
		t.Fatal(err)
	}
	collect := func(sql string) map[string]string {
		t.Helper()
		rows, err := owner.Query(t.Context(), sql)
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]string{}
		var key, value string
		if _, err := pgx.ForEachRow(rows, []any{&key, &value}, func() error { found[key] = value; return nil }); err != nil {
			t.Fatal(err)
		}
		return found
	}
	tenants := collect(`SELECT source || ' ' || event_id, labels ->> 'tenant' FROM decuwatch.scores
		WHERE class_label = 'class 8' AND event_time >= now() - interval '7 days'`)
	alerted := collect(`SELECT DISTINCT source || ' ' || event_id, '' FROM decuwatch.alerts`)
	want := map[string][2]int64{}
	for request, tenant := range tenants {
		counts := want[tenant]
		counts[0]++
		if _, ok := alerted[request]; ok {
			counts[1]++
		}
		want[tenant] = counts
	}
	asked := false
	for _, q := range cookbook(t) {
		if !strings.Contains(q[0], "tenant") {
			continue
		}
		asked = true
		rows, err := reader(t, url).Query(t.Context(), q[1])
		if err != nil {
			t.Fatal(err)
		}
		got, err := pgx.CollectRows(rows, pgx.RowToMap)
		if err != nil || len(got) != len(want) || len(want) == 0 {
			t.Fatalf("%d tenants, want %d: %v", len(got), len(want), err)
		}
		for _, row := range got {
			tenant, _ := row["tenant"].(string)
			if row["requests"] != want[tenant][0] || row["with_alert"] != want[tenant][1] {
				t.Errorf("%s: %v requests, %v with an alert; want %v", tenant, row["requests"], row["with_alert"], want[tenant])
			}
		}
	}
	if !asked {
		t.Error("no question is about tenants")
	}
}

package postgres_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// BenchmarkRecord commits scores from several goroutines at a time, on a server that flushes to disk.
func BenchmarkRecord(b *testing.B) {
	ctx := testContext(b)
	server, err := local.Start(ctx, local.Options{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer server.Stop()
	if err := postgres.Migrate(ctx, server.URL()); err != nil {
		b.Fatal(err)
	}
	s, err := postgres.Open(ctx, postgres.Config{URL: server.URL()})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	var n atomic.Uint64
	for _, callers := range []int{1, 8, 64, 512} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			b.SetParallelism((callers + 1) / 2)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					i := n.Add(1)
					v := scoreVerdict(i, fmt.Sprint("event-", i))
					v.Score.ClassIndex = int(i % 100)
					if _, err := s.Record(b.Context(), v); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "scores/s")
		})
	}
}

// questions are what dashboards and analysts ask most; each must stay below 200 ms at a million scores.
var questions = []struct{ name, query string }{
	{"class means by day, 30 days", `SELECT day, class_label, class_gap_mean, request_risk_mean
		FROM decuwatch_views.class_risk_daily
		WHERE model = 'fashion-mnist' AND day >= now() - interval '30 days' ORDER BY 1, 2`},
	{"riskiest classes of a day", `SELECT class_label, max(request_risk_max), sum(warnings + criticals)
		FROM decuwatch_views.class_risk_hourly
		WHERE model = 'fashion-mnist' AND hour >= now() - interval '1 day' GROUP BY 1 ORDER BY 2 DESC LIMIT 10`},
	{"one class, all hours", `SELECT hour, n, class_gap_mean, request_risk_mean FROM decuwatch_views.class_risk_hourly
		WHERE model = 'fashion-mnist' AND class_index = 3 ORDER BY hour`},
	{"newest scores of a class", `SELECT * FROM decuwatch_views.scores WHERE model = 'fashion-mnist' AND class_index = 3
		ORDER BY event_time DESC LIMIT 100`},
	{"distribution of a class, 7 days",
		`SELECT width_bucket(request_risk, 0, 0.05, 50), count(*) FROM decuwatch_views.scores
		WHERE model = 'fashion-mnist' AND class_index = 3 AND event_time >= now() - interval '7 days' GROUP BY 1`},
	{"tenants of a class, 7 days", `SELECT labels ->> 'tenant', count(*) FROM decuwatch_views.scores
		WHERE model = 'fashion-mnist' AND class_index = 3 AND event_time >= now() - interval '7 days' GROUP BY 1`},
	{"a tenant's newest scores", `SELECT event_time, class_label, request_risk FROM decuwatch_views.scores
		WHERE labels @> '{"tenant": "tenant-3"}' AND event_time >= now() - interval '1 day' ORDER BY event_time DESC
		LIMIT 100`},
	{"alerts by hour and severity, 7 days",
		`SELECT date_trunc('hour', event_time), severity, count(*) FROM decuwatch_views.alerts
		WHERE model = 'fashion-mnist' AND event_time >= now() - interval '7 days' GROUP BY 1, 2`},
	{"review backlog", `SELECT state, count(*) FROM decuwatch_views.reviews GROUP BY 1`},
	{"coverage by day", `SELECT date_trunc('day', hour), outcome, reason, sum(n) FROM decuwatch_views.coverage
		GROUP BY 1, 2, 3`},
	{"an event's score", `SELECT * FROM decuwatch_views.events e
		JOIN decuwatch_views.scores s USING (event_time, source, event_id) WHERE e.source = '//studio/render-3'
		AND e.event_id = 'event-3'`},
}

// BenchmarkViews asks the questions of databases of several sizes, with 100 classes over 90 days.
func BenchmarkViews(b *testing.B) {
	for _, scores := range []int{10_000, 100_000, 1_000_000} {
		url := pgtest.URL(b)
		pgtest.Seed(b, url, scores, 100, 90)
		conn := connect(b, url)
		for _, q := range questions {
			b.Run(fmt.Sprintf("scores=%d/%s", scores, q.name), func(b *testing.B) {
				for b.Loop() {
					rows, err := conn.Query(b.Context(), q.query)
					if err != nil {
						b.Fatal(err)
					}
					n := 0
					for rows.Next() {
						n++
					}
					if rows.Err() != nil || n == 0 {
						b.Fatal(n, rows.Err())
					}
				}
			})
		}
	}
}

// BenchmarkRollups asks the rollups of a database with 10 million scores of 1000 classes over 90 days, and prints the
// plans. Only the rollups are filled: 2.16 million rows by hour, 90,000 by day.
func BenchmarkRollups(b *testing.B) {
	url := pgtest.URL(b)
	conn := connect(b, url)
	for _, span := range []string{"hour", "day"} {
		if _, err := conn.Exec(b.Context(), strings.ReplaceAll(`INSERT INTO decuwatch.class_SPAN_parts
			SELECT h, 'fashion-mnist', repeat('1', 64), 'seeded', c, 'class ' || c, n, n * 0.02, n * 0.0005, 0.01, 0.03, 0,
			n * 0.01, n * 0.0002, 0.005, 0.02, 0, c % 3, 0, true
			FROM generate_series(date_trunc('SPAN', now() - interval '90 days', 'UTC'), now(), interval '1 SPAN') h,
			generate_series(0, 999) c,
				(SELECT CASE 'SPAN' WHEN 'hour' THEN 5 ELSE 111 END AS n) x`, "SPAN", span)); err != nil {
			b.Fatal(err)
		}
	}
	if _, err := conn.Exec(b.Context(), `VACUUM ANALYZE`); err != nil {
		b.Fatal(err)
	}
	for _, q := range []struct{ name, query string }{
		{"all classes by day, 30 days", `SELECT day, class_label, class_gap_mean FROM decuwatch_views.class_risk_daily
			WHERE model = 'fashion-mnist' AND day >= now() - interval '30 days'`},
		{"classes that became riskier this week",
			`SELECT class_label, sum(class_gap_mean * n) FILTER (WHERE day >= now() - interval '7 days') / sum(n)
				FILTER (WHERE day >= now() - interval '7 days')
			- sum(class_gap_mean * n) FILTER (WHERE day < now() - interval '7 days') / sum(n)
				FILTER (WHERE day < now() - interval '7 days') AS rise
			FROM decuwatch_views.class_risk_daily WHERE model = 'fashion-mnist' AND day >= now() - interval '14 days' GROUP BY 1
			ORDER BY 2 DESC LIMIT 10`},
		{"all classes of a day by hour",
			`SELECT hour, class_label, class_gap_mean FROM decuwatch_views.class_risk_hourly WHERE model = 'fashion-mnist'
				AND hour >= now() - interval '1 day'`},
		{"one class by hour, 90 days", `SELECT hour, class_gap_mean FROM decuwatch_views.class_risk_hourly
			WHERE model = 'fashion-mnist' AND class_index = 3`},
	} {
		rows, err := conn.Query(b.Context(), `EXPLAIN ANALYZE `+q.query)
		if err != nil {
			b.Fatal(err)
		}
		plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			b.Fatal(err)
		}
		b.Logf("%s:\n%s", q.name, strings.Join(plan, "\n"))
		b.Run(q.name, func(b *testing.B) {
			for b.Loop() {
				if _, err := conn.Exec(b.Context(), q.query); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestQuestions checks that each question has an answer.
func TestQuestions(t *testing.T) {
	url := pgtest.URL(t)
	pgtest.Seed(t, url, 5000, 100, 30)
	conn := connect(t, url)
	for _, q := range questions {
		rows, err := conn.Query(t.Context(), q.query)
		if err != nil {
			t.Errorf("%s: %v", q.name, err)
			continue
		}
		n := 0
		for rows.Next() {
			n++
		}
		if rows.Err() != nil || n == 0 {
			t.Errorf("%s: %d rows, %v", q.name, n, rows.Err())
		}
	}
}

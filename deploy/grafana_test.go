package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.yaml.in/yaml/v3"

	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// board is the part of a dashboard that the tests read.
type board struct {
	UID, Title, Description string
	Templating              struct {
		List []struct {
			Name, Type string
			Query      any
			IncludeAll bool
			Datasource source
		}
	}
	Annotations struct {
		List []struct {
			Name       string
			Datasource source
			Target     struct{ RawSQL, Format string }
		}
	}
	Panels []panel
}

type source struct{ Type, UID string }

type panel struct {
	ID                       int
	Type, Title, Description string
	Datasource               source
	GridPos                  struct{ X, Y, W, H int }
	FieldConfig              struct{ Defaults struct{ Unit string } }
	Targets                  []struct {
		RefID        string
		Datasource   source
		RawSQL, Expr string
		Format       string
	}
}

func boards(t testing.TB) map[string]board {
	t.Helper()
	paths, err := filepath.Glob("grafana/dashboards/*.json")
	if err != nil || len(paths) < 3 {
		t.Fatalf("dashboards: %v, %v", paths, err)
	}
	all := map[string]board{}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var b board
		if err := json.Unmarshal(content, &b); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		all[strings.TrimSuffix(filepath.Base(path), ".json")] = b
	}
	return all
}

// TestDashboards holds what every panel must have, and that the data sources are the provisioned ones.
func TestDashboards(t *testing.T) {
	var provisioned struct{ Datasources []source }
	readYAML(t, "grafana/provisioning/datasources/decuwatch.yml", &provisioned)
	known := map[source]bool{}
	for _, s := range provisioned.Datasources {
		known[s] = true
	}
	uids := map[string]bool{}
	for name, b := range boards(t) {
		if b.UID == "" || uids[b.UID] || b.Title == "" || b.Description == "" {
			t.Errorf("%s: uid %q, title %q, description %q", name, b.UID, b.Title, b.Description)
		}
		uids[b.UID] = true
		ids, cells := map[int]bool{}, map[[2]int]string{}
		for _, p := range b.Panels {
			if p.Title == "" || len(p.Description) < 20 || p.FieldConfig.Defaults.Unit == "" ||
				len(p.Targets) == 0 || ids[p.ID] {
				t.Errorf("%s: panel %d %q: description %q, unit %q, %d queries", name, p.ID, p.Title, p.Description,
					p.FieldConfig.Defaults.Unit, len(p.Targets))
			}
			ids[p.ID] = true
			for _, target := range p.Targets {
				if !known[p.Datasource] || target.Datasource != p.Datasource {
					t.Errorf("%s: %s: data source %v", name, p.Title, target.Datasource)
				}
			}
			for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
				for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
					if other := cells[[2]int{x, y}]; other != "" || x >= 24 {
						t.Fatalf("%s: %s overlaps %q at %d, %d", name, p.Title, other, x, y)
					}
					cells[[2]int{x, y}] = p.Title
				}
			}
		}
	}
}

func readYAML(t testing.TB, path string, into any) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(content, into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// seeded returns the address of a database with this number of scores, and with what pgtest.Seed leaves out:
// thresholds, verdicts of reviewers, evidence, skips, dead letters, canaries.
func seeded(t testing.TB, scores int) string {
	t.Helper()
	url := pgtest.URL(t)
	pgtest.Seed(t, url, scores, 20, 14)
	conn := connect(t, url)
	for _, statement := range []string{
		`INSERT INTO decuwatch.threshold_changes (kind, set_by, reason) VALUES ('calibration', 'test', 'seeded')`,
		`INSERT INTO decuwatch.thresholds (change_id, model, ensemble_digest, settings, measurement, scope, class_index,
			severity, value, withdrawn, origin, n, alpha, achieved, set_by, reason)
		SELECT c.id, 'fashion-mnist', repeat('1', 64), 'seeded', m, s.scope, s.class_index, s.severity, CASE m
			WHEN 'class_gap' THEN 0.08 ELSE 0.025 END, false, 'calibrated', 1000, 0.01, 0.011, 'test', ''
		FROM decuwatch.threshold_changes c, unnest(ARRAY['class_gap', 'request_risk', 'image_risk']) m,
			(VALUES ('model', NULL::integer, 'warn'), ('model', NULL, 'critical'), ('class', 3, 'warn')) s(scope, class_index,
				severity)`,
		`UPDATE decuwatch.reviews SET state = 'resolved', verdict = CASE WHEN class_index % 3 = 0 THEN 'false_alarm'
			ELSE 'confirmed' END, resolved_at = opened_at, version = 2
		WHERE event_id ~ '[02468]00$'`,
		// The smallest PNG there is: one transparent pixel.
		`INSERT INTO decuwatch.evidence (review_id, name, content_type, body)
		SELECT id, 'image-0', 'image/png', decode('89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489' ||
			'0000000d49444154789c6360000000000500010d0a2db40000000049454e44ae426082', 'hex') FROM decuwatch.reviews`,
		`INSERT INTO decuwatch.skips (source, event_id, event_time, model, class, reason, detail, labels)
		SELECT '//studio', 'skip-' || i, now() - i * interval '1 hour', 'fashion-mnist', '3', 'noise',
			'generator is not known', '{"tenant": "tenant-1"}' FROM generate_series(1, 40) i`,
		`INSERT INTO decuwatch.dead_letters (stream, sequence, digest, delivered, source, event_id, event_time, model,
			subject, payload, field, reason, kind)
		SELECT 'GENERATION', 1000000 + i, repeat('2', 64), 1, '//studio/render-' || i % 3, 'dead-' || i,
			now() - i * interval '1 hour', 'fashion-mnist', 'generation.requested.fashion-mnist', '{}', 'data.seed',
				'is missing', 'invalid' FROM generate_series(1, 20) i`,
		`INSERT INTO decuwatch.outcome_hour_parts (hour, model, outcome, reason, n)
		SELECT date_trunc('hour', now()) - i * interval '1 hour', 'fashion-mnist', o.outcome, o.reason, 1
		FROM generate_series(1, 40) i, (VALUES ('skip', 'noise'), ('dead_letter', 'invalid')) o(outcome, reason)`,
		`INSERT INTO decuwatch.canaries (source, event_id, model, class_index, class_label, published_at, due_at, outcome,
			decided_at)
		SELECT '/decuwatch/canary', 'canary-' || i, 'fashion-mnist', 3, 'class 3', now() - i * interval '1 hour', now(), CASE
			WHEN i = 7 THEN 'missed' ELSE 'caught' END, now() FROM generate_series(2, 9) i`,
	} {
		if _, err := conn.Exec(t.Context(),
			strings.ReplaceAll(statement, "generate_series", "pg_catalog.generate_series")); err != nil {
			t.Fatalf("%v in %s", err, statement)
		}
	}
	return url
}

func connect(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// reader connects and becomes the role that Grafana and analysts have: it sees views only.
func reader(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	conn := connect(t, url)
	if _, err := conn.Exec(t.Context(), `SET ROLE decuwatch_reader`); err != nil {
		t.Fatal(err)
	}
	return conn
}

var timeFilter = regexp.MustCompile(`\$__timeFilter\(([^()]+)\)`)

// expand puts values in place of Grafana's macros and variables, as its Postgres data source does.
func expand(sql string, values map[string]string, from, to time.Time) string {
	sql = timeFilter.ReplaceAllString(sql, fmt.Sprintf("$1 BETWEEN '%s' AND '%s'", from.UTC().Format(time.RFC3339),
		to.UTC().Format(time.RFC3339)))
	for name, value := range values {
		sql = strings.ReplaceAll(sql, "${"+name+":sqlstring}", value)
		sql = strings.ReplaceAll(sql, "${"+name+":raw}", strings.Trim(value, "'"))
	}
	return sql
}

// variables returns the values of a dashboard's variables. If a variable takes all classes, it has every class.
func variables(t testing.TB, conn *pgx.Conn, b board, label string) map[string]string {
	t.Helper()
	values := map[string]string{"label": "'" + label + "'"}
	for _, v := range b.Templating.List {
		query, ok := v.Query.(string)
		if v.Type != "query" || !ok || v.Datasource.UID != "decuwatch-postgres" {
			continue
		}
		rows, err := conn.Query(t.Context(), expand(query, values, time.Time{}, time.Time{}))
		if err != nil {
			t.Fatalf("variable %s: %v", v.Name, err)
		}
		// The last column is the value. If there are two columns, the first is what people read.
		list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
			values, err := row.Values()
			return fmt.Sprint(values[len(values)-1]), err
		})
		if err != nil || len(list) == 0 {
			t.Fatalf("variable %s: %q, %v", v.Name, list, err)
		}
		quoted := make([]string, len(list))
		for i, s := range list {
			quoted[i] = "'" + s + "'"
		}
		if v.IncludeAll {
			values[v.Name] = strings.Join(quoted, ",")
		} else {
			values[v.Name] = quoted[0] // class 0 has the seeded alerts
		}
	}
	return values
}

var leftover = regexp.MustCompile(`\$__\w+|\$\{\w+`)

// eachSQL calls do with each SQL query of the dashboards, expanded.
func eachSQL(t testing.TB, conn *pgx.Conn, label string, do func(name, format, sql string)) {
	t.Helper()
	to := time.Now().Add(time.Minute)
	n := 0
	for name, b := range boards(t) {
		values := variables(t, conn, b, label)
		for _, a := range b.Annotations.List {
			n++
			do(name+"/"+a.Name, a.Target.Format, expand(a.Target.RawSQL, values, to.AddDate(0, 0, -7), to))
		}
		for _, p := range b.Panels {
			for _, target := range p.Targets {
				if target.RawSQL == "" {
					continue
				}
				sql := expand(target.RawSQL, values, to.AddDate(0, 0, -7), to)
				if rest := leftover.FindString(sql); rest != "" {
					t.Fatalf("%s: %s: %s is not expanded", name, p.Title, rest)
				}
				n++
				do(name+"/"+p.Title+"/"+target.RefID, target.Format, sql)
			}
		}
	}
	if n < 20 {
		t.Fatalf("%d queries", n)
	}
}

// TestDashboardSQL runs every SQL query of the dashboards as the reader, with a label and without.
func TestDashboardSQL(t *testing.T) {
	conn := reader(t, seeded(t, 6000))
	check := func(name, format, sql string) {
		rows, err := conn.Query(t.Context(), sql)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		fields := rows.FieldDescriptions()
		columns := make([]string, len(fields))
		for i, f := range fields {
			columns[i] = f.Name
		}
		got, err := pgx.CollectRows(rows, pgx.RowToMap)
		if err != nil || len(got) == 0 {
			t.Errorf("%s: %d rows, %v\n%s", name, len(got), err, sql)
			return
		}
		for column, value := range got[0] {
			if len(columns) == 1 && value == nil {
				t.Errorf("%s: %s is NULL", name, column)
			}
		}
		if format == "time_series" {
			if _, ok := got[0]["time"].(time.Time); !ok || len(columns) < 2 {
				t.Errorf("%s: columns %q, must begin with a time", name, columns)
			}
		}
	}
	eachSQL(t, conn, "", check)
	eachSQL(t, conn, "tenant=tenant-0", check) // class 0's tenant
}

// BenchmarkDashboardSQL times every SQL query of the dashboards at a million scores, and prints its plan with -v:
// make bench-dashboards.
func BenchmarkDashboardSQL(b *testing.B) {
	url := seeded(b, 1_000_000)
	size(b, connect(b, url))
	conn := reader(b, url)
	eachSQL(b, conn, "", func(name, _, sql string) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := conn.Exec(b.Context(), sql); err != nil {
					b.Fatal(err)
				}
			}
			logPlan(b, conn, sql)
		})
	})
}

// TestDashboardTypes checks the dashboards against Grafana's own types, with the TypeScript compiler, and shows that
// the check fails if it should.
func TestDashboardTypes(t *testing.T) {
	node, tsc := tool(t, "node", "node/bin/node"), tool(t, "", "dashboard-types/node_modules/typescript/bin/tsc")
	modules := filepath.Dir(filepath.Dir(filepath.Dir(tsc)))
	dir := t.TempDir()
	if err := os.Symlink(modules, filepath.Join(dir, "node_modules")); err != nil {
		t.Fatal(err)
	}
	check, err := os.ReadFile("grafana/types/check.ts")
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("check.ts", string(check))
	files := []string{"wrong.ts"}
	for name := range boards(t) {
		content, err := os.ReadFile("grafana/dashboards/" + name + ".json")
		if err != nil {
			t.Fatal(err)
		}
		typed := "import type { Board } from './check';\nexport const board: Board = "
		write(name+".ts", typed+string(content))
		files = append(files, name+".ts")
		if name == "risk-overview" {
			write("wrong.ts", typed+strings.Replace(string(content), `"displayMode": "list"`, `"displayMode": "lost"`, 1))
		}
	}
	cmd := exec.CommandContext(t.Context(), node,
		append([]string{tsc, "--noEmit", "--strict", "--skipLibCheck", "--preserveSymlinks",
			"--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler"}, files...)...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "wrong.ts") {
		t.Fatalf("a wrong option was not found: %v: %s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "error") && !strings.HasPrefix(line, "wrong.ts") {
			t.Error(line)
		}
	}
}

// tool returns the path of a program: in .tools or, if it has a name, in PATH.
func tool(t testing.TB, name, unpacked string) string {
	t.Helper()
	if path, err := filepath.Abs(filepath.Join("../.tools", unpacked)); err == nil {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	if name != "" {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Fatalf("%s is missing (run: make deploy-tools)", unpacked)
	return ""
}

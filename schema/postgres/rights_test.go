package postgres_test

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// login makes a login in a role of the database and returns its connection and its address.
func login(t *testing.T, owner *pgx.Conn, url, role string) (*pgx.Conn, string) {
	t.Helper()
	name := "test_" + strings.NewReplacer("/", "_", "-", "_", " ", "_").Replace(strings.ToLower(t.Name()))
	for _, sql := range []string{`DROP ROLE IF EXISTS ` + name,
		`CREATE ROLE ` + name + ` LOGIN PASSWORD 'secret' IN ROLE ` + role} {
		if _, err := owner.Exec(testContext(t), sql); err != nil {
			t.Fatal(err)
		}
	}
	address := pgtest.As(t, url, name, "secret")
	conn := connect(t, address)
	t.Cleanup(func() {
		conn.Close(testContext(t))
		if _, err := owner.Exec(testContext(t), `DROP OWNED BY `+name); err != nil {
			t.Error(err)
		}
		if _, err := owner.Exec(testContext(t), `DROP ROLE `+name); err != nil {
			t.Error(err)
		}
	})
	return conn, address
}

// TestRights compares every right in the database with the table in docs/security.md, for all tables, views, sequences,
// functions and roles.
func TestRights(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	mustRecord(t, s, scoreVerdict(1, "one")) // a partition exists
	tables := list(t, conn, `
		WITH rights AS (
			SELECT c.relname, a.grantee, a.privilege_type || '' AS privilege, a.is_grantable
			FROM pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) a
			WHERE c.relnamespace = 'decuwatch'::regnamespace AND a.grantee <> c.relowner
			UNION ALL
			SELECT c.relname, a.grantee, a.privilege_type || ' (' || string_agg(attname, ', ' ORDER BY attname) || ')',
				a.is_grantable
			FROM pg_catalog.pg_class c JOIN pg_catalog.pg_attribute t ON t.attrelid = c.oid, pg_catalog.aclexplode(t.attacl) a
			WHERE c.relnamespace = 'decuwatch'::regnamespace AND a.grantee <> c.relowner
			GROUP BY 1, 2, a.privilege_type, 4
		)
		SELECT format('| %s%s | %s%s |', '`+"`"+`' || relname || '`+"`"+`',
			CASE WHEN grantee <> 'decuwatch_writer'::regrole THEN ' as ' || coalesce(r.rolname, 'PUBLIC') END,
			string_agg(privilege, ', ' ORDER BY array_position(ARRAY['SELECT', 'INSERT'], privilege), privilege),
			CASE WHEN bool_or(is_grantable) THEN ' WITH GRANT OPTION' END)
		FROM rights LEFT JOIN pg_catalog.pg_roles r ON r.oid = grantee GROUP BY relname, grantee, r.rolname ORDER BY relname`)
	for _, line := range list(t, conn,
		`SELECT c.relname || ' ' || a.privilege_type || ' ' || coalesce(r.rolname, 'PUBLIC')
			FROM pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) a
		LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
		WHERE c.relnamespace = 'decuwatch_views'::regnamespace AND a.grantee <> c.relowner
			AND (a.privilege_type <> 'SELECT' OR r.rolname NOT IN ('decuwatch_reader', 'decuwatch_writer')
				OR r.rolname IS NULL)`) {
		t.Errorf("a view may be more than read: %s", line)
	}
	functions := list(t, conn, `
		SELECT format('| %s | %s |', '`+"`"+`' || p.proname || '('
			|| pg_catalog.pg_get_function_identity_arguments(p.oid) || ')`+"`"+`',
			(SELECT string_agg(coalesce('`+"`"+`' || r.rolname || '`+"`"+`', 'everybody'), ', ' ORDER BY r.rolname)
				FROM pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner)))
				a LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee WHERE a.grantee <> p.proowner))
		FROM pg_catalog.pg_proc p WHERE p.pronamespace IN ('decuwatch'::regnamespace, 'decuwatch_views'::regnamespace)
		AND p.prosecdef ORDER BY p.proname`)
	if len(tables) < 15 || len(functions) < 4 {
		t.Fatalf("%d tables and %d functions", len(tables), len(functions))
	}
	content, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(content), "### Rights in Postgres\n")
	if !found {
		t.Fatal("docs/security.md has no section of rights in Postgres")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var documented []string
	for line := range strings.Lines(section) {
		if cells := strings.Split(strings.TrimSpace(line), " | "); strings.HasPrefix(line, "| `") {
			documented = append(documented, strings.TrimSuffix(strings.Join(cells[:2], " | "), " |")+" |")
		}
	}
	for _, right := range append(tables, functions...) {
		if !slices.Contains(documented, right) {
			t.Errorf("docs/security.md does not say: %s", right)
		}
	}
	for _, line := range documented {
		if !slices.Contains(append(tables, functions...), line) {
			t.Errorf("docs/security.md says what is not so: %s", line)
		}
	}
	// Functions of the owner look names up in the catalog first, and in the caller's temporary tables last.
	for _, name := range list(t, conn,
		`SELECT p.oid::regprocedure::text FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'decuwatch'::regnamespace
			AND p.prosecdef
		AND NOT 'search_path=pg_catalog, pg_temp' = ANY (coalesce(p.proconfig, '{}'))`) {
		t.Errorf("%s runs as the owner with another search_path", name)
	}
}

// TestWriterCannotErase tries to erase data as the monitor's login: by a statement on each table, and by each function
// with the arguments that an attacker would give.
func TestWriterCannotErase(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	fill(t, s, conn, at)
	if _, err := s.SetThreshold(testContext(t), threshold(0.1)); err != nil {
		t.Fatal(err)
	}
	before := rows(t, conn)
	writer, _ := login(t, conn, conn.Config().ConnString(), "decuwatch_writer")
	for _, table := range list(t, conn,
		`SELECT c.oid::regclass::text FROM pg_catalog.pg_class c
			WHERE c.relnamespace IN ('decuwatch'::regnamespace, 'decuwatch_views'::regnamespace)
			AND relkind IN ('r', 'p', 'v')`) {
		for _, sql := range []string{`DELETE FROM ` + table, `TRUNCATE ` + table, `DROP TABLE ` + table,
			`ALTER TABLE ` + table + ` DISABLE TRIGGER ALL`} {
			if _, err := writer.Exec(testContext(t), sql); err == nil {
				t.Errorf("the writer may: %s", sql)
			}
		}
	}
	for _, sql := range []string{
		`UPDATE decuwatch.outbox SET body = ''`, `UPDATE decuwatch.reviews SET opened_at = '2000-01-01'`,
		`UPDATE decuwatch.canaries SET due_at = 'infinity'`,
		`UPDATE decuwatch.evidence SET made_at = '2000-01-01'`, `UPDATE decuwatch.review_history SET comment = ''`,
		`SELECT decuwatch.drop_partitions('infinity')`, `SELECT decuwatch.drop_old_scores('-1000 years')`,
		`SELECT decuwatch.drop_old_scores('29 days')`,
		`SELECT decuwatch.delete_old('alerts', '0')`, `SELECT decuwatch.delete_old('events', NULL)`,
		`SELECT decuwatch.delete_old(NULL, NULL)`,
		`SELECT decuwatch.delete_old('alerts', '-1 month')`, `SELECT decuwatch.delete_old('thresholds', '400 days')`,
		`SELECT decuwatch.ensure_partition('infinity')`,
		`SELECT decuwatch.ensure_partition('-infinity')`, `SELECT decuwatch.ensure_partition(NULL)`,
	} {
		if _, err := writer.Exec(testContext(t), sql); err == nil {
			t.Errorf("the writer may: %s", sql)
		}
	}
	// Temporary tables do not stand in for the catalog's.
	month := partitions(t, conn)[0]
	for _, sql := range []string{
		`CREATE TEMPORARY TABLE pg_inherits AS
			SELECT 'decuwatch.` + month + `'::regclass::oid AS inhrelid, 'decuwatch.scores'::regclass::oid AS inhparent`,
		`CREATE TEMPORARY TABLE pg_class AS
			SELECT 'decuwatch.` + month + `'::regclass::oid AS oid, 'scores_2001_01'::name AS relname, 0::oid AS relnamespace`,
	} {
		if _, err := writer.Exec(testContext(t), sql); err != nil {
			t.Fatal(err)
		}
	}
	var dropped []string
	if err := writer.QueryRow(testContext(t),
		`SELECT decuwatch.drop_old_scores('400 days')`).Scan(&dropped); err != nil || len(dropped) != 0 {
		t.Errorf("dropped %v, %v", dropped, err)
	}
	// Nothing that may be called with the shortest retentions reaches what was written today.
	for _, r := range settings.WithDefaults(postgres.Maintenance{}).Retentions() {
		call := `SELECT decuwatch.delete_old('` + r.Kind + `', $1)`
		if r.Kind == "scores" {
			call = `SELECT decuwatch.drop_old_scores($1)`
		}
		if _, err := writer.Exec(testContext(t), call, max(r.Least, time.Hour)); err != nil {
			t.Error(err)
		}
	}
	for table, n := range rows(t, conn) {
		if n != before[table] {
			t.Errorf("%s has %d rows, had %d", table, n, before[table])
		}
	}
}

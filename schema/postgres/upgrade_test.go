package postgres_test

import (
	"database/sql"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver of goose
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"

	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// TestUpgrade brings tables of the first version, with rows in them, to the newest.
func TestUpgrade(t *testing.T) {
	url := pgtest.EmptyURL(t)
	conn := connect(t, url)
	ctx := testContext(t)
	first := fstest.MapFS{}
	for _, file := range []string{"00001_tables.sql", "00002_review.sql", "00003_views.sql", "00100_review_job.sql"} {
		content, err := os.ReadFile("migrations/" + file)
		if err != nil {
			t.Fatal(err)
		}
		first[file] = &fstest.MapFile{Data: content}
	}
	db, err := sql.Open("pgx", url)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := conn.Exec(ctx, `CREATE SCHEMA decuwatch`); err != nil {
		t.Fatal(err)
	}
	p, err := goose.NewProvider(database.DialectPostgres, db, first, goose.WithTableName("decuwatch.migrations"),
		goose.WithDisableGlobalRegistry(true))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Up(ctx); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`INSERT INTO decuwatch.dead_letters (stream, sequence, digest, delivered, subject, payload, kind, field, reason)
			VALUES ('s', 1, repeat('0', 64), 1, '', 'old', 'invalid', '', 'r')`,
		`INSERT INTO decuwatch.events (source, event_id, digest, outcome, reason, event_time, model, stream, sequence,
			delivered) VALUES ('s', 'old', repeat('0', 64), 'skip', 'noise', now(), 'm', 's', 2, 1)`,
		`INSERT INTO decuwatch.events (source, event_id, digest, outcome, reason, event_time, model, stream, sequence,
			delivered)
			VALUES ('s', 'open', repeat('1', 64), 'dead_letter', 'unknown_model', now(), 'm', 's', 4, 1)`,
		`INSERT INTO decuwatch.dead_letters (stream, sequence, digest, delivered, source, event_id, event_time, model,
			subject, payload, kind, field, reason)
			VALUES ('s', 4, repeat('1', 64), 1, 's', 'open', now(), 'm', 'generation.requested.m', 'p', 'unknown_model', '',
			'r')`,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := postgres.Open(ctx, postgres.Config{URL: url}); err == nil ||
		!strings.Contains(err.Error(), "decuwatch migrate") {
		t.Errorf("opened older tables: %v", err)
	}
	if err := postgres.Migrate(ctx, url); err != nil {
		t.Fatal(err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.migration_hashes WHERE version_id <= 100`); n != len(first) {
		t.Errorf("%d hashes of the %d migrations that were there", n, len(first))
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.dead_letters WHERE payload_text = 'old'
		AND payload_bytes = 3 AND payload_state = 'whole'`); n != 1 {
		t.Errorf("%d old dead letters", n)
	}
	// Ids belong to one model each, and events that no worker took are open.
	if got := list(t, conn, `SELECT event_id FROM decuwatch.events ORDER BY 1`); len(got) != 1 || got[0] != "old" {
		t.Errorf("events are %v", got)
	}
	if _, err := conn.Exec(ctx, `INSERT INTO decuwatch.events (source, event_id, digest, outcome, reason, event_time,
		model, stream, sequence, delivered)
		VALUES ('s', 'old', repeat('2', 64), 'skip', 'noise', now(), 'n', 's', 5, 1)`); err != nil {
		t.Error(err)
	}
	// A program of the first version still writes while workers are replaced.
	if _, err := conn.Exec(ctx, `INSERT INTO decuwatch.dead_letters (stream, sequence, digest, delivered, subject,
		payload, kind, field, reason) VALUES ('s', 3, repeat('0', 64), 1, '', 'x', 'invalid', '', 'r')`); err != nil {
		t.Error(err)
	}
	works(t, url)
}

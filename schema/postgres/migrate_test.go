package postgres_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// TestMigrationsAreFrozen compares the files with their hashes: a migration that a database may have applied is never
// edited.
func TestMigrationsAreFrozen(t *testing.T) {
	sums, err := os.ReadFile("migrations/SHA256SUMS")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("migrations/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]string{}
	for line := range strings.Lines(string(sums)) {
		hash, file, _ := strings.Cut(strings.TrimSpace(line), "  ")
		known[file] = hash
	}
	if len(known) != len(files) {
		t.Errorf("%d hashes for %d files", len(known), len(files))
	}
	for _, path := range files {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		file, sum := filepath.Base(path), fmt.Sprintf("%x", sha256.Sum256(content))
		if known[file] == "" {
			t.Errorf("migrations/SHA256SUMS lacks the line of a new migration: %s  %s", sum, file)
		} else if known[file] != sum {
			t.Errorf("%s was edited; databases have applied it: add a new migration instead", file)
		}
	}
}

func TestMigrationsThatWereEdited(t *testing.T) {
	url := pgtest.URL(t)
	conn := connect(t, url)
	ctx := testContext(t)
	applied := count(t, conn, `SELECT count(*) FROM decuwatch.migrations WHERE version_id > 0`)
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.migration_hashes`); n != applied {
		t.Errorf("%d hashes of %d migrations", n, applied)
	}
	// A database from before the hashes gets them at the next run.
	sudo(t, conn, `DELETE FROM decuwatch.migration_hashes`)
	if err := postgres.Migrate(ctx, url); err != nil {
		t.Fatal(err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.migration_hashes`); n != applied {
		t.Errorf("%d hashes of %d migrations", n, applied)
	}
	sudo(t, conn, `UPDATE decuwatch.migration_hashes SET sha256 = repeat('0', 64) WHERE version_id = 2`)
	before := list(t, conn, objects)
	for name, f := range map[string]func() error{
		"migrate": func() error { return postgres.Migrate(ctx, url) },
		"down":    func() error { return postgres.MigrateDown(ctx, url) },
		"open": func() error {
			s, err := postgres.Open(ctx, postgres.Config{URL: url})
			if err == nil {
				s.Close()
			}
			return err
		},
	} {
		if err := f(); !errors.Is(err, postgres.ErrEdited) || !strings.Contains(err.Error(), "00002_review.sql") {
			t.Errorf("%s: %v, want the name of the edited migration", name, err)
		}
	}
	if after := list(t, conn, objects); len(after) != len(before) {
		t.Errorf("%d objects, had %d", len(after), len(before))
	}
}

// TestOlderProgram meets tables that a newer program made: migrations refuse, verdicts are written.
func TestOlderProgram(t *testing.T) {
	url := pgtest.URL(t)
	conn := connect(t, url)
	ctx := testContext(t)
	sudo(t, conn, `INSERT INTO decuwatch.migrations (version_id, is_applied) VALUES (99999, true)`,
		`INSERT INTO decuwatch.migration_hashes (version_id, file, sha256) VALUES (99999, '99999_new.sql', repeat('1', 64))`,
		`ALTER TABLE decuwatch.events ADD COLUMN of_tomorrow text`)
	before := list(t, conn, objects)
	for name, err := range map[string]error{"migrate": postgres.Migrate(ctx, url),
		"down": postgres.MigrateDown(ctx, url)} {
		if !errors.Is(err, postgres.ErrNewer) || !strings.Contains(err.Error(), "99999") {
			t.Errorf("%s: %v, want ErrNewer with the version", name, err)
		}
	}
	if after := list(t, conn, objects); len(after) != len(before) {
		t.Errorf("%d objects, had %d", len(after), len(before))
	}
	works(t, url)
}

// TestUnreleasedTables meets a database that an unreleased build made by migrations of the same numbers: it is
// refused, and unchanged.
func TestUnreleasedTables(t *testing.T) {
	url := pgtest.URL(t)
	conn := connect(t, url)
	ctx := testContext(t)
	sudo(t, conn, `DELETE FROM decuwatch.migrations WHERE version_id >= 110`,
		`DROP TABLE decuwatch.migration_hashes, decuwatch.class_day_parts CASCADE`)
	before := list(t, conn, objects)
	if err := postgres.Migrate(ctx, url); err == nil || !strings.Contains(err.Error(), "unreleased build") {
		t.Errorf("%v, want an error that names the unreleased build", err)
	}
	if after := list(t, conn, objects); len(after) != len(before) {
		t.Errorf("%d objects, had %d", len(after), len(before))
	}
}

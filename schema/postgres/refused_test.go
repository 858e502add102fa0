package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// TestRefused sorts every class of SQLSTATE: only errors about the contents of a row are an event's fault.
func TestRefused(t *testing.T) {
	for code, refused := range map[string]bool{
		"22P02": true, "22003": true, "22021": true, "22008": true, "22001": true, // data exceptions
		"23514": true, "23502": true, "23505": true, "23503": true, // constraints
		"": false, "00000": false, "01000": false, "02000": false, "03000": false, "08006": false, "08P01": false,
		"0A000": false, "20000": false, "21000": false, "24000": false, "25006": false, "25P02": false, "25P03": false,
		"26000": false, "28000": false, "28P01": false, "2D000": false, "34000": false, "3D000": false, "3F000": false,
		"40001": false, "40P01": false, "40003": false, "42P01": false, "42501": false, "42703": false, "42883": false,
		"42P05": false, "53000": false, "53100": false, "53200": false, "53300": false, "53400": false, "54000": false,
		"55000": false, "55006": false, "55P03": false, "57000": false, "57014": false, "57P01": false, "57P02": false,
		"57P03": false, "57P05": false, "58000": false, "58030": false, "58P01": false, "F0000": false, "HV000": false,
		"P0001": false, "XX000": false, "XX001": false, "XX002": false,
	} {
		err := fmt.Errorf("record verdict: %w", &pgconn.PgError{Code: code, TableName: "scores",
			ConstraintName: "scores_check"})
		if got := postgres.Refused(err); got != refused {
			t.Errorf("SQLSTATE %q: refused %t, want %t", code, got, refused)
		}
	}
	if postgres.Refused(&pgconn.PgError{Code: "23514", TableName: "scores", Message: "keine Partition"}) {
		t.Error("a missing partition is an event's fault")
	}
}

// TestAway sorts errors: those that waiting may help, and those that need a person.
func TestAway(t *testing.T) {
	for code, away := range map[string]bool{
		"08006": true, "53300": true, "57P03": true, "57P01": true, "57P02": true, "58030": true, "25006": true,
		"28P01": false, "28000": false, "3D000": false, "42501": false, "42P01": false, "22P02": false, "23505": false,
		"": false, "0A000": false,
	} {
		err := fmt.Errorf("postgres: %w", &pgconn.PgError{Code: code})
		if got := postgres.Away(err); got != away {
			t.Errorf("SQLSTATE %q: away %t, want %t", code, got, away)
		}
	}
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
	for _, err := range []error{refused, &net.DNSError{Name: "postgres"}, io.ErrUnexpectedEOF, context.DeadlineExceeded} {
		if !postgres.Away(fmt.Errorf("postgres: %w", err)) {
			t.Errorf("%v: not away", err)
		}
	}
	for _, err := range []error{nil, postgres.ErrSession, postgres.ErrNotMigrated, postgres.ErrEdited, context.Canceled,
		errors.New("server refused TLS connection")} {
		if postgres.Away(err) {
			t.Errorf("%v: away", err)
		}
	}
}

// TestDatabaseThatFails takes the database away in ways that a server reports by different errors. No error is the
// event's fault, and when the database is back the same verdict is written.
func TestDatabaseThatFails(t *testing.T) {
	for name, c := range map[string]struct{ away, back string }{
		"schema gone": {`ALTER SCHEMA decuwatch RENAME TO gone`, `ALTER SCHEMA gone RENAME TO decuwatch`},
		"table gone":  {`ALTER TABLE decuwatch.skips RENAME TO gone`, `ALTER TABLE decuwatch.gone RENAME TO skips`},
		"column gone": {`ALTER TABLE decuwatch.events RENAME COLUMN model TO gone`,
			`ALTER TABLE decuwatch.events RENAME COLUMN gone TO model`},
		"no rights": {`REVOKE ALL ON decuwatch.events FROM decuwatch_writer`,
			`GRANT SELECT, INSERT ON decuwatch.events TO decuwatch_writer`},
		"a trigger fails": {`CREATE FUNCTION decuwatch.fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE disk_full;
			END'; CREATE TRIGGER fail
			BEFORE INSERT ON decuwatch.events FOR EACH ROW EXECUTE FUNCTION decuwatch.fail()`,
			`DROP FUNCTION decuwatch.fail CASCADE`},
		"read-only": {`CREATE FUNCTION decuwatch.fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
			RAISE read_only_sql_transaction; END'; CREATE TRIGGER fail
			BEFORE INSERT ON decuwatch.events FOR EACH ROW EXECUTE FUNCTION decuwatch.fail()`,
			`DROP FUNCTION decuwatch.fail CASCADE`},
		"no partitions": {`CREATE FUNCTION decuwatch.f(timestamptz) RETURNS boolean LANGUAGE sql AS 'SELECT true';
			ALTER FUNCTION decuwatch.ensure_partition RENAME TO g; ALTER FUNCTION decuwatch.f RENAME TO ensure_partition;
			GRANT EXECUTE ON FUNCTION decuwatch.ensure_partition TO decuwatch_writer`,
			`DROP FUNCTION decuwatch.ensure_partition; ALTER FUNCTION decuwatch.g RENAME TO ensure_partition`},
	} {
		t.Run(name, func(t *testing.T) {
			_, conn := open(t, postgres.Config{})
			_, address := login(t, conn, conn.Config().ConnString(), "decuwatch_writer")
			s, err := postgres.Open(testContext(t), postgres.Config{URL: address})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if _, err := conn.Exec(testContext(t), c.away); err != nil {
				t.Fatal(err)
			}
			verdicts := []schema.Verdict{
				{Delivery: delivery(2, "skip"), Skip: &schema.Skip{Event: event("skip"), Reason: "noise"}},
				scoreVerdict(1, "score"),
			}
			failed := 0
			for _, v := range verdicts {
				if _, err := s.Record(testContext(t), v); err != nil {
					failed++
					if postgres.Refused(err) {
						t.Errorf("the event is refused: %v", err)
					}
				}
			}
			if failed == 0 {
				t.Error("nothing failed")
			}
			if _, err := conn.Exec(testContext(t), c.back); err != nil {
				t.Fatal(err)
			}
			for _, v := range verdicts {
				mustRecord(t, s, v)
			}
		})
	}
}

// TestOneRowThatFails makes the server fail on one row with an error that does not name it: the other verdicts are
// written.
func TestOneRowThatFails(t *testing.T) {
	s, conn := open(t, postgres.Config{Committers: 1})
	for _, sql := range []string{
		`CREATE FUNCTION decuwatch.fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE program_limit_exceeded; END'`,
		`CREATE TRIGGER fail BEFORE INSERT ON decuwatch.events FOR EACH ROW WHEN (NEW.event_id = 'poison')
			EXECUTE FUNCTION decuwatch.fail()`,
		`BEGIN`, `LOCK TABLE decuwatch.events`, // so that the next verdicts wait for one another, and share a transaction
	} {
		if _, err := conn.Exec(testContext(t), sql); err != nil {
			t.Fatal(err)
		}
	}
	const n = 20
	failed := make(chan error, n)
	for i := range n {
		id := fmt.Sprint("good", i)
		if i == n/2 {
			id = "poison"
		}
		go func() {
			_, err := s.Record(testContext(t), scoreVerdict(uint64(i+1), id))
			if (id == "poison") == (err == nil) {
				failed <- fmt.Errorf("%s: %v", id, err)
			} else {
				failed <- nil
			}
		}()
	}
	for waiting, end := 0, time.Now().Add(30*time.Second); waiting == 0 && time.Now().Before(end); {
		waiting = count(t, conn, `SELECT count(*) FROM pg_catalog.pg_locks WHERE NOT granted AND database = (SELECT oid
			FROM pg_catalog.pg_database WHERE datname = current_database())`)
	}
	if _, err := conn.Exec(testContext(t), `COMMIT`); err != nil {
		t.Fatal(err)
	}
	for range n {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
}

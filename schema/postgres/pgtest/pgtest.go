// Package pgtest gives each test a fresh, migrated database on a real PostgreSQL server.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
)

const (
	template = "decuwatch_template"
	deadline = 3 * time.Minute // far above what any step needs, so that a slow machine does not fail a test
)

// server is the one server of the test binary. It has no goroutine, stops when the binary ends, however it ends, and
// leaves nothing behind. It does not flush to disk: a test of crashes starts a server of its own with package local.
var server struct {
	sync.Mutex
	*local.Server
	err error
	n   int
}

// New returns a store on a fresh, migrated database. It is closed and the database dropped when the test ends.
func New(t testing.TB) *postgres.Store {
	t.Helper()
	return Open(t, postgres.Config{})
}

// Open is New with a configuration, whose URL is set by Open.
func Open(t testing.TB, c postgres.Config) *postgres.Store {
	t.Helper()
	c.URL = URL(t)
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	s, err := postgres.Open(ctx, c)
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	t.Cleanup(s.Close)
	return s
}

// URL returns the address of a fresh, migrated database, which is dropped when the test ends. Its search_path is
// empty, so that SQL with unqualified names fails.
func URL(t testing.TB) string {
	t.Helper()
	return create(t, template)
}

// EmptyURL is URL without the migrations.
func EmptyURL(t testing.TB) string {
	t.Helper()
	return create(t, "template1")
}

func create(t testing.TB, from string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	server.Lock() // a template may have no other connections while it is copied
	defer server.Unlock()
	if server.Server == nil && server.err == nil {
		server.Server, server.err = start(ctx)
	}
	if server.err != nil {
		t.Fatalf("pgtest: %v", server.err)
	}
	server.n++
	name := fmt.Sprintf("test_%d", server.n)
	quoted := pgx.Identifier{name}.Sanitize()
	err := admin(ctx, server.Server, "CREATE DATABASE "+quoted+" TEMPLATE "+from,
		"ALTER DATABASE "+quoted+" SET search_path = ''")
	if err != nil {
		t.Fatalf("pgtest: create database: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		server.Lock()
		defer server.Unlock()
		if err := admin(ctx, server.Server, "DROP DATABASE "+quoted+" WITH (FORCE)"); err != nil {
			t.Errorf("pgtest: drop database: %v", err)
		}
	})
	return server.DatabaseURL(name)
}

// ShiftedURL is URL of a database whose clock_timestamp is ahead of the real time.
func ShiftedURL(t testing.TB, ahead time.Duration) string {
	t.Helper()
	url := EmptyURL(t)
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	defer conn.Close(ctx)
	for _, statement := range []string{
		`SET allow_system_table_mods = on`,
		`ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO real_clock_timestamp`,
		fmt.Sprintf(`CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
			$$ SELECT pg_catalog.real_clock_timestamp() + interval '%d seconds' $$`, int(ahead.Seconds())),
	} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			t.Fatalf("pgtest: shift the clock: %v", err)
		}
	}
	if err := postgres.Migrate(ctx, url); err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	return url
}

// As returns a database's address for another user of it.
func As(t testing.TB, address, user, password string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	u.User = url.UserPassword(user, password)
	return u.String()
}

func start(ctx context.Context) (*local.Server, error) {
	dir, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		return nil, err
	}
	s, err := local.Start(ctx, local.Options{Dir: dir, Remove: true, Settings: map[string]string{
		"fsync": "off", "full_page_writes": "off", "max_connections": "200", "shared_buffers": "64MB",
		"wal_level": "minimal", "max_wal_senders": "0",
	}})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if err := admin(ctx, s, "CREATE DATABASE "+template, "ALTER DATABASE "+template+" SET search_path = ''"); err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	if err := postgres.Migrate(ctx, s.DatabaseURL(template)); err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

func admin(ctx context.Context, s *local.Server, statements ...string) error {
	conn, err := pgx.Connect(ctx, s.DatabaseURL("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

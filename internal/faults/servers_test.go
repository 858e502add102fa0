package faults

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
)

// deadline bounds what takes seconds on a healthy machine.
const deadline = 2 * time.Minute

// database is a PostgreSQL server of the campaign. Each run gets a new database on it.
type database struct {
	t       testing.TB
	options local.Options
	server  *local.Server
	next    int
}

const template = "faults_template"

// throwaway are settings for servers that are never killed.
func throwaway() map[string]string {
	return map[string]string{"fsync": "off", "full_page_writes": "off", "shared_buffers": "64MB", "max_connections": "100"}
}

// durable are settings for servers that are killed.
func durable() map[string]string {
	return map[string]string{
		"shared_buffers": "64MB", "max_connections": "100", "wal_level": "minimal", "max_wal_senders": "0",
	}
}

// startDatabase starts a server in dir, or in a temporary directory if dir is "". Its migrated template has thresholds
// that make every score an alert.
func startDatabase(t testing.TB, dir string, settings map[string]string) *database {
	t.Helper()
	if dir == "" {
		var err error
		if dir, err = os.MkdirTemp("", "faults"); err != nil {
			t.Fatal(err)
		}
	}
	d := &database{t: t, options: local.Options{Dir: dir, Port: natstest.FreePort(t), Settings: settings, Remove: true}}
	d.start()
	t.Cleanup(func() {
		d.server.Kill()
		if err := os.RemoveAll(filepath.Join(dir, "cluster")); err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(dir) // a mount point stays
	})
	d.admin("CREATE DATABASE " + template)
	d.admin("ALTER DATABASE " + template + " SET search_path = ''")
	address := d.server.DatabaseURL(template)
	verb(t, 0, "migrate", "--postgres.url="+address)
	verb(t, 0, "thresholds", "set", tiny, "--measurement=class_gap", "--value=1e-12", "--reason=every score fires",
		"--by=faults", "--postgres.url="+address)
	return d
}

func (d *database) start() {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	var err error
	if d.server, err = local.Start(ctx, d.options); err != nil {
		d.t.Fatal(err)
	}
}

// fresh returns the address of a migrated database without events.
func (d *database) fresh(t testing.TB) string {
	t.Helper()
	d.next++
	name := fmt.Sprintf("run_%d", d.next)
	d.clone(name, template)
	t.Cleanup(func() { d.drop(name) })
	return d.server.DatabaseURL(name)
}

// clone copies a database. Its connections must be closed.
func (d *database) clone(name, from string) {
	d.t.Helper()
	d.admin("SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE datname = '" + from + "'")
	d.admin("CREATE DATABASE " + name + " TEMPLATE " + from)
	d.admin("ALTER DATABASE " + name + " SET search_path = ''")
}

func (d *database) drop(name string) { d.admin("DROP DATABASE IF EXISTS " + name + " WITH (FORCE)") }

// admin runs a statement as the superuser.
func (d *database) admin(statement string) {
	d.t.Helper()
	var err error
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = d.try(statement); err == nil {
			return
		}
	}
	d.t.Fatalf("%s: %v", statement, err)
}

func (d *database) try(statement string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, d.server.DatabaseURL("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, statement)
	return err
}

// through returns an address with the host and port of a proxy.
func through(t testing.TB, address, host string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = host
	return u.String()
}

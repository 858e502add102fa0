package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// ErrSession is returned by Open and Migrate for an address whose sessions are not as this program needs them. The text
// says what was found and what is needed.
var ErrSession = errors.New("the database session is not as decuwatch needs it")

// errNotWritable is an ErrSession that may go away by itself, after a failover.
var errNotWritable = fmt.Errorf("%w: it cannot write", ErrSession)

// connectTimeout bounds an attempt to connect, unless the address has connect_timeout.
const connectTimeout = 10 * time.Second

// leastServer is the oldest server that is supported, as server_version_num counts.
const leastServer = 150000

// always are the settings that every session has, whatever the server, the database and the role say.
var always = map[string]string{
	"client_encoding":               "UTF8",
	"standard_conforming_strings":   "on",
	"search_path":                   "",
	"TimeZone":                      "UTC",
	"extra_float_digits":            "1", // numbers that travel as JSON come back exactly
	"default_transaction_isolation": "read committed",
}

// configure has each connection of c set its session up and read back what the server made of it. The settings are set
// by statements, not when connecting: a pooler drops or refuses parameters of the latter kind.
func configure(c *pgx.ConnConfig, settings map[string]string) error {
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		if c.DefaultQueryExecMode == mode {
			return fmt.Errorf("%w: the address sets default_query_exec_mode=%s; leave it out, or use cache_statement, "+
				"cache_describe or describe_exec", ErrSession, strings.ReplaceAll(mode.String(), " ", "_"))
		}
	}
	all := maps.Clone(always)
	maps.Copy(all, settings)
	for name := range c.RuntimeParams {
		for own := range all {
			if strings.EqualFold(own, name) {
				return fmt.Errorf("%w: the address sets %s, which this program sets itself: leave it out", ErrSession, name)
			}
		}
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "decuwatch"
	}
	c.ConnectTimeout = cmp.Or(c.ConnectTimeout, connectTimeout)
	c.AfterConnect = func(ctx context.Context, conn *pgconn.PgConn) error { return setUp(ctx, conn, all) }
	return nil
}

// setUp sets the settings of a new session and checks what it got.
func setUp(ctx context.Context, conn *pgconn.PgConn, settings map[string]string) error {
	var set, read []string
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		set = append(set, fmt.Sprintf("pg_catalog.set_config('%s', '%s', false)", name, settings[name]))
		read = append(read, "'"+name+"'")
	}
	if _, err := query(ctx, conn, "SELECT "+strings.Join(set, ", ")); err != nil {
		return fmt.Errorf("set up session: %w", err)
	}
	rows, err := query(ctx, conn, `
		SELECT name, setting FROM pg_catalog.pg_settings WHERE name IN (`+strings.Join(read, ", ")+`)
		UNION ALL SELECT 'server_version_num', pg_catalog.current_setting('server_version_num')
		UNION ALL SELECT 'server_encoding', pg_catalog.current_setting('server_encoding')
		UNION ALL SELECT 'in recovery', pg_catalog.pg_is_in_recovery()::text
		UNION ALL SELECT 'default_transaction_read_only', pg_catalog.current_setting('default_transaction_read_only')`)
	if err != nil {
		return fmt.Errorf("read session back: %w", err)
	}
	found := map[string]string{}
	for _, row := range rows {
		found[string(row[0])] = string(row[1])
	}
	return checkSession(found, settings)
}

// checkSession holds what a session says against what it must be.
func checkSession(found, settings map[string]string) error {
	if version, err := strconv.Atoi(found["server_version_num"]); err != nil || version < leastServer {
		return fmt.Errorf("%w: the server is of version %q, must be at least 15", ErrSession, found["server_version_num"])
	}
	if found["server_encoding"] != "UTF8" {
		return fmt.Errorf("%w: the database's encoding is %s, must be UTF8", ErrSession, found["server_encoding"])
	}
	if found["in recovery"] != "false" {
		return fmt.Errorf("%w: the server is a standby (pg_is_in_recovery)", errNotWritable)
	}
	if found["default_transaction_read_only"] != "off" {
		return fmt.Errorf("%w: the database or the role is read-only (default_transaction_read_only is on)", errNotWritable)
	}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if found[name] != settings[name] {
			return fmt.Errorf("%w: %s is %q, must be %q: something between this program and the server drops settings",
				ErrSession, name, found[name], settings[name])
		}
	}
	return nil
}

// query runs one statement by the simple protocol and returns its rows as text.
func query(ctx context.Context, conn *pgconn.PgConn, sql string) ([][][]byte, error) {
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, err
	}
	return results[0].Rows, nil
}

// checkPooler fails if a pooler between this program and the server gives a client's server connection to others
// between two transactions: settings, prepared statements, locks of a session and LISTEN would then belong to anybody.
// A client of such a pooler either meets another client's backend, or a backend of its own that changes.
func checkPooler(ctx context.Context, c *pgx.ConnConfig) error {
	var clients [2]*pgx.Conn
	var backends [2]string
	const rounds = 5
	for round := range rounds {
		for i := range clients {
			if round == 0 {
				conn, err := pgx.ConnectConfig(ctx, c)
				if err != nil {
					return err
				}
				defer conn.Close(context.WithoutCancel(ctx))
				clients[i] = conn
			}
			rows, err := query(ctx, clients[i].PgConn(), `SELECT pg_catalog.pg_backend_pid()`)
			if err != nil {
				return fmt.Errorf("look for a pooler: %w", err)
			}
			before := backends[i]
			backends[i] = string(rows[0][0])
			if i == 0 && backends[i] == strconv.Itoa(int(clients[i].PgConn().PID())) {
				return nil // no pooler: the server itself answered the connection
			}
			if before != "" && before != backends[i] || i == 1 && backends[0] == backends[1] {
				return fmt.Errorf("%w: a pooler gives sessions away between transactions; it must keep them (pgbouncer: "+
					"pool_mode = session)", ErrSession)
			}
		}
	}
	return nil
}

package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// with returns an address with one more parameter.
func with(t testing.TB, address, name, value string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	q.Set(name, value)
	u.RawQuery = q.Encode()
	return u.String()
}

// refuses wants Open and Migrate to refuse an address by name.
func refuses(t testing.TB, address, why string) {
	t.Helper()
	if s, err := postgres.Open(testContext(t), postgres.Config{URL: address}); !errors.Is(err, postgres.ErrSession) ||
		!strings.Contains(err.Error(), why) {
		if err == nil {
			s.Close()
		}
		t.Errorf("open: %v, want an error that says %q", err, why)
	}
	if err := postgres.Migrate(testContext(t), address); !errors.Is(err, postgres.ErrSession) ||
		!strings.Contains(err.Error(), why) {
		t.Errorf("migrate: %v, want an error that says %q", err, why)
	}
}

// works shows that everything that depends on the session does.
func works(t testing.TB, address string) {
	t.Helper()
	s, err := postgres.Open(testContext(t), postgres.Config{URL: address, StatementTimeout: 23 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(testContext(t))
	notified, ended := make(chan struct{}, 100), make(chan error, 1)
	go func() { ended <- s.Listen(ctx, postgres.ChannelThresholds, func() { notified <- struct{}{} }) }()
	defer func() { cancel(); <-ended }()
	wait := func() {
		t.Helper()
		select {
		case <-notified:
		case <-ctx.Done():
			t.Fatal("no notification of a change")
		}
	}
	wait()
	v := scoreVerdict(1, "one")
	v.Alerts = []schema.Alert{alert(v.Score, "a")}
	v.Score.ClassGap.Value = 0.1 + 0.2 // its 17th digit counts
	mustRecord(t, s, v)
	if stored, err := s.ScoreByID(ctx, schema.Identity{ID: "one"}); err != nil ||
		stored.ClassGap.Value != v.Score.ClassGap.Value {
		t.Errorf("%v came back, %v", stored, err)
	}
	if got, err := s.OutboxNext(ctx, schema.SinkStream, 10, time.Minute); err != nil || len(got) != 1 {
		t.Errorf("%d messages, %v", len(got), err)
	}
	if _, err := s.SetThreshold(ctx, threshold(0.1)); err != nil {
		t.Error(err)
	}
	wait()
	if err := s.MaintainOnce(ctx); err != nil {
		t.Error(err)
	}
	if err := s.Fold(ctx); err != nil {
		t.Error(err)
	}
}

func TestSessionSettings(t *testing.T) {
	for _, name := range []string{"statement_timeout", "lock_timeout", "synchronous_commit", "search_path", "timezone",
		"client_encoding"} {
		if _, err := postgres.Open(testContext(t), postgres.Config{URL: with(t, pgtest.URL(t), name, "1")}); !errors.Is(err,
			postgres.ErrSession) || !strings.Contains(err.Error(), name) {
			t.Errorf("an address that sets %s: %v", name, err)
		}
	}
	for _, mode := range []string{"exec", "simple_protocol"} {
		refuses(t, with(t, pgtest.URL(t), "default_query_exec_mode", mode), "default_query_exec_mode")
	}
	for _, mode := range []string{"cache_statement", "cache_describe", "describe_exec"} {
		works(t, with(t, pgtest.URL(t), "default_query_exec_mode", mode))
	}
	// What the server, the database or the role set does not reach a session, or is refused.
	for _, c := range []struct{ setting, refused string }{
		{"client_encoding = 'LATIN1'", ""}, {"extra_float_digits = 0", ""}, {"statement_timeout = '1s'",
			""}, {"standard_conforming_strings = off", ""},
		{"default_transaction_isolation = 'serializable'", ""}, {"timezone = 'Asia/Kathmandu'",
			""}, {"datestyle = 'SQL, DMY'", ""}, {"intervalstyle = 'sql_standard'", ""},
		{"bytea_output = 'escape'", ""}, {"default_transaction_read_only = on", "read-only"},
	} {
		address := pgtest.URL(t)
		conn := connect(t, address)
		if _, err := conn.Exec(testContext(t),
			`ALTER DATABASE `+pgx.Identifier{conn.Config().Database}.Sanitize()+` SET `+c.setting); err != nil {
			t.Fatal(err)
		}
		if c.refused != "" {
			refuses(t, address, c.refused)
		} else {
			works(t, address)
		}
	}
}

func TestServerThatDoesNotFit(t *testing.T) {
	t.Run("encoding", func(t *testing.T) {
		conn := connect(t, pgtest.EmptyURL(t))
		if _, err := conn.Exec(testContext(t),
			`CREATE DATABASE ascii ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0`); err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(conn.Config().ConnString())
		if err != nil {
			t.Fatal(err)
		}
		u.Path = "/ascii"
		refuses(t, u.String(), "SQL_ASCII, must be UTF8")
		if _, err := conn.Exec(testContext(t), `DROP DATABASE ascii WITH (FORCE)`); err != nil {
			t.Error(err)
		}
	})
	t.Run("standby", func(t *testing.T) {
		ctx := testContext(t)
		o := local.Options{Dir: filepath.Join(t.TempDir(), "server"), Settings: map[string]string{"fsync": "off"}}
		server, err := local.Start(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(postgres.Migrate(ctx, server.URL()), server.Stop()); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(o.Dir, "cluster", "standby.signal"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		o.Remove = true
		if server, err = local.Start(ctx, o); err != nil {
			t.Fatal(err)
		}
		defer server.Stop()
		refuses(t, server.URL(), "standby")
	})
}

// TestPooler puts a real pgbouncer before the server: sessions work, anything less is refused by name.
func TestPooler(t *testing.T) {
	for _, c := range []struct {
		name, settings string
		session        bool
	}{
		{"session", "pool_mode = session", true},
		{"session with reset", "pool_mode = session\nserver_reset_query = DISCARD ALL\nserver_round_robin = 1", true},
		{"transaction", "pool_mode = transaction", false},
		{"transaction, one connection", "pool_mode = transaction\ndefault_pool_size = 1", false},
		{"transaction, in turn", "pool_mode = transaction\nserver_round_robin = 1\nmin_pool_size = 8", false},
		{"transaction, parameters ignored",
			"pool_mode = transaction\nignore_startup_parameters = statement_timeout, lock_timeout, search_path, " +
				"synchronous_commit, idle_in_transaction_session_timeout", false},
		{"statement", "pool_mode = statement", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			address := pgtest.URL(t)
			direct := connect(t, address)
			pooled := pgbouncer(t, direct.Config(), c.settings)
			if !c.session {
				refuses(t, pooled, "pool_mode = session")
				return
			}
			works(t, pooled)
			if err := postgres.Migrate(testContext(t), pooled); err != nil {
				t.Error(err)
			}
		})
	}
}

// pgbouncer runs one before a database and returns the address by which the database is reached through it.
func pgbouncer(t *testing.T, server *pgx.ConnConfig, settings string) string {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/pgbouncer"); err != nil {
			t.Fatal("pgbouncer is not installed (run: make setup)")
		}
	}
	dir, err := os.MkdirTemp("", "pgbouncer") // open to the user that pgbouncer runs as
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	for name, content := range map[string]string{
		"users": fmt.Sprintf("%q %q\n", server.User, server.Password),
		"ini": fmt.Sprintf("[databases]\n* = host=127.0.0.1 port=%d\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = "+
			"%d\nunix_socket_dir =\nauth_type = trust\nauth_file = %s/users\n%s\n",
			server.Port, port, dir, settings),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{filepath.Join(dir, "ini")}
	if os.Getuid() == 0 {
		args = append([]string{"-u", "nobody"}, args...)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, args...)
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	address := pgtest.As(t, server.ConnString(), server.User, server.Password)
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = fmt.Sprintf("127.0.0.1:%d", port)
	for ctx := testContext(t); ; {
		conn, err := net.Dial("tcp", u.Host)
		if err == nil {
			conn.Close()
			return u.String()
		}
		select {
		case <-ctx.Done():
			t.Fatalf("pgbouncer does not answer: %v: %s", err, log.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

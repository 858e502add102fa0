// Package local runs a private PostgreSQL server in a directory, for the demo and for tests.
package local

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"
)

// ErrNotFound is returned by Start if no PostgreSQL installation is found.
var ErrNotFound = errors.New("PostgreSQL is not installed: initdb and postgres are neither in PATH nor in " +
	"/usr/lib/postgresql (run: make setup)")

// Database is the database that a server has from its start.
const Database = "decuwatch"

const (
	capDACOverride = 1 // Linux capability: reach a directory whose parents are closed to the server's user
	startAttempts  = 5 // another process may take the free port between the choice and the bind
)

// Options of a server.
type Options struct {
	Dir      string            // of cluster, password and log. Created if missing; may be from an earlier Start
	Port     int               // on 127.0.0.1. Defaults to the port of the last start if it is free, else to any free one
	Settings map[string]string // of postgresql.conf, by -c
	Log      *os.File          // of the server. Defaults to Dir/postgres.log
	Remove   bool              // remove Dir when the server stops, also when this process dies without Stop
	Wait     time.Duration     // for the server to answer. Defaults to 2 minutes
}

// Server is a running PostgreSQL server. It stops when the process that started it ends, however it ends.
type Server struct {
	opts    Options
	port    int
	user    string // the superuser
	secret  string
	cmd     *exec.Cmd
	janitor *exec.Cmd
	pipe    *os.File // its closing, by Stop or by this process's death, wakes the janitor
	ended   bool
}

// Start starts a server and returns when it answers. If Dir holds no cluster yet it makes one, with the database
// Database and a superuser who logs in with a random password over loopback. PostgreSQL refuses to run as root: a
// process of root starts it as the user postgres, or as nobody if there is no such user, and gives Dir to that user.
func Start(ctx context.Context, o Options) (*Server, error) {
	if o.Wait == 0 {
		o.Wait = 2 * time.Minute
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("start postgres: %w", err)
	}
	o.Dir = dir
	bin, err := binaries()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("start postgres: %w", err)
	}
	attr, err := identity(dir)
	if err != nil {
		return nil, fmt.Errorf("start postgres: %w", err)
	}
	s := &Server{opts: o, user: "decuwatch"}
	if err := s.initialise(ctx, bin, attr); err != nil {
		return nil, err
	}
	if s.opts.Log == nil {
		s.opts.Log, err = os.OpenFile(filepath.Join(dir, "postgres.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, fmt.Errorf("start postgres: %w", err)
		}
		defer s.opts.Log.Close() //nolint:errcheck // the child has its own copy
	}
	if err := s.launchOnFreePort(ctx, bin, attr); err != nil {
		return nil, fmt.Errorf("start postgres in %s: %w", dir, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "port"), []byte(strconv.Itoa(s.port)+"\n"), 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("start postgres: %w", err), s.Stop())
	}
	if err := s.createDatabase(ctx); err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

// launchOnFreePort launches the server, and tries again while the processes of a killed server are still ending, or
// if another process takes the port first.
func (s *Server) launchOnFreePort(ctx context.Context, bin string, attr *syscall.SysProcAttr) (err error) {
	began := time.Now()
	for attempt := 0; ; attempt++ {
		if s.port, err = s.choosePort(attempt); err != nil {
			return err
		}
		if err = s.launch(ctx, bin, attr); err == nil || ctx.Err() != nil {
			return err
		}
		ending := strings.Contains(err.Error(), "pre-existing shared memory block") ||
			s.opts.Port != 0 && strings.Contains(err.Error(), "Address already in use")
		switch {
		case ending && time.Since(began) < s.opts.Wait:
			time.Sleep(50 * time.Millisecond)
		case s.opts.Port != 0 || attempt >= startAttempts:
			return err
		}
	}
}

// URL returns the address of the database Database, with the superuser's name and password.
func (s *Server) URL() string { return s.DatabaseURL(Database) }

// DatabaseURL returns the address of another database of the server.
func (s *Server) DatabaseURL(name string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(s.user, s.secret),
		Host: s.Address(), Path: "/" + name, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Address returns host and port, for a proxy in front of the server.
func (s *Server) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// Port returns the server's port on 127.0.0.1.
func (s *Server) Port() int { return s.port }

// Stop ends the server in an orderly way, cutting connections, and waits for it. After a minute it kills.
func (s *Server) Stop() error {
	if s.ended {
		return nil
	}
	_ = s.cmd.Process.Signal(syscall.SIGINT) // "fast" shutdown
	timer := time.AfterFunc(time.Minute, func() { s.killGroup() })
	err := s.cmd.Wait()
	timer.Stop()
	s.end()
	if err != nil {
		return fmt.Errorf("stop postgres: %w", err)
	}
	return nil
}

// Kill ends the server and all its processes by SIGKILL, as a crash would. Start on the same Dir recovers it.
func (s *Server) Kill() {
	if s.ended {
		return
	}
	remove := s.opts.Remove
	s.opts.Remove = false
	// The first process is stopped before its children are listed, so that it makes no more of them. They have process
	// groups of their own.
	_ = s.cmd.Process.Signal(syscall.SIGSTOP)
	children := childrenOf(s.cmd.Process.Pid)
	_ = s.cmd.Process.Kill()
	for _, pid := range children {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_ = s.cmd.Wait()
	s.end()
	s.opts.Remove = remove
}

// childrenOf returns the processes whose parent is pid.
func childrenOf(pid int) []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is well-formed
	var children []int
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it ended
		}
		// pid (name) state parent ...; the name may hold anything.
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if len(fields) < 2 || fields[1] != strconv.Itoa(pid) {
			continue
		}
		if child, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			children = append(children, child)
		}
	}
	return children
}

func (s *Server) killGroup() { _ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL) }

func (s *Server) end() {
	s.ended = true
	_ = syscall.Kill(-s.janitor.Process.Pid, syscall.SIGKILL)
	_ = s.janitor.Wait()
	_ = s.pipe.Close()
	if s.opts.Remove {
		_ = os.RemoveAll(s.opts.Dir)
	}
}

// binaries returns the directory of the newest installation.
func binaries() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), "postgres")); err == nil {
				return filepath.Dir(path), nil
			}
		}
	}
	patterns := []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"}
	if dir, err := os.Getwd(); err == nil {
		for ; dir != "/"; dir = filepath.Dir(dir) {
			patterns = append(patterns, filepath.Join(dir, ".tools/postgresql/usr/lib/postgresql/*/bin"))
		}
	}
	for _, pattern := range patterns {
		found, _ := filepath.Glob(pattern) // the pattern is well-formed
		slices.SortFunc(found, func(a, b string) int { return version(b) - version(a) })
		for _, dir := range found {
			if _, err := os.Stat(filepath.Join(dir, "initdb")); err != nil {
				continue
			}
			if _, err := os.Stat(filepath.Join(dir, "postgres")); err == nil {
				return dir, nil
			}
		}
	}
	return "", ErrNotFound
}

// version returns the major version in a path such as /usr/lib/postgresql/15/bin.
func version(bin string) int {
	v, _ := strconv.Atoi(strings.TrimLeft(filepath.Base(filepath.Dir(bin)), "pgsql-"))
	return v
}

// environment returns the child's environment: an installation in .tools has its libraries beside it.
func environment(bin string) []string {
	env := append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	if i := strings.Index(bin, "/.tools/postgresql/"); i >= 0 {
		libs, _ := filepath.Glob(bin[:i] + "/.tools/postgresql/usr/lib/*-linux-gnu")
		if len(libs) > 0 {
			path := strings.Join(libs, ":")
			if old := os.Getenv("LD_LIBRARY_PATH"); old != "" {
				path += ":" + old
			}
			env = append(env, "LD_LIBRARY_PATH="+path)
		}
	}
	return env
}

// identity returns how to start the server's processes: in a process group of their own, so that Ctrl-C on a
// terminal does not reach them, and as another user if this process is root.
func identity(dir string) (*syscall.SysProcAttr, error) {
	attr := &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() != 0 {
		return attr, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, errors.New("root may not run PostgreSQL, and there is neither a user postgres nor nobody")
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(uid), int(gid))
	})
	if err != nil {
		return nil, err
	}
	for parent := filepath.Dir(dir); ; parent = filepath.Dir(parent) {
		info, err := os.Stat(parent)
		if err != nil {
			return nil, err
		}
		stat := info.Sys().(*syscall.Stat_t)
		if info.Mode()&0o001 == 0 && stat.Uid != uint32(uid) {
			// The user cannot enter root's home; the capability lets it pass, and nothing else.
			attr.AmbientCaps = []uintptr{capDACOverride}
		}
		if parent == "/" {
			return attr, nil
		}
	}
}

func (s *Server) initialise(ctx context.Context, bin string, attr *syscall.SysProcAttr) error {
	secretFile := filepath.Join(s.opts.Dir, "password")
	cluster := filepath.Join(s.opts.Dir, "cluster")
	if _, err := os.Stat(filepath.Join(cluster, "PG_VERSION")); err == nil {
		secret, err := os.ReadFile(secretFile)
		if err != nil {
			return fmt.Errorf("start postgres: %w", err)
		}
		s.secret = strings.TrimSpace(string(secret))
		return nil
	}
	if err := os.RemoveAll(cluster); err != nil { // left by an initdb that was interrupted
		return fmt.Errorf("start postgres: %w", err)
	}
	random := make([]byte, 16)
	crand.Read(random)
	s.secret = hex.EncodeToString(random)
	if err := os.WriteFile(secretFile, []byte(s.secret+"\n"), 0o600); err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	if attr.Credential != nil {
		if err := os.Chown(secretFile, int(attr.Credential.Uid), int(attr.Credential.Gid)); err != nil {
			return fmt.Errorf("start postgres: %w", err)
		}
	}
	partial := cluster + ".part"
	if err := os.RemoveAll(partial); err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "--pgdata", partial, "--username", s.user,
		"--pwfile", secretFile, "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync",
		"--no-instructions")
	cmd.Dir = "/" // the capability to enter a closed directory comes with the exec only
	cmd.Env = environment(bin)
	cmd.SysProcAttr = attr
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb in %s: %w: %s", s.opts.Dir, err, bytes.TrimSpace(out))
	}
	return os.Rename(partial, cluster)
}

func (s *Server) choosePort(attempt int) (int, error) {
	if s.opts.Port != 0 {
		return s.opts.Port, nil
	}
	if attempt == 0 {
		if text, err := os.ReadFile(filepath.Join(s.opts.Dir, "port")); err == nil {
			if port, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
				if l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
					l.Close()
					return port, nil
				}
			}
		}
	}
	// Below the range of ports for outgoing connections, so that the port stays free while the server is down.
	for range 100 {
		port := 12_000 + rand.N(20_000)
		if l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			l.Close()
			return port, nil
		}
	}
	return 0, errors.New("no free port on 127.0.0.1 was found")
}

// launch starts the server and its janitor and waits until the server answers.
func (s *Server) launch(ctx context.Context, bin string, attr *syscall.SysProcAttr) error {
	settings := map[string]string{
		"listen_addresses": "127.0.0.1", "port": strconv.Itoa(s.port), "unix_socket_directories": "",
		"password_encryption": "scram-sha-256", "timezone": "UTC", "log_timezone": "UTC",
	}
	for name, value := range s.opts.Settings {
		settings[name] = value
	}
	args := []string{"-D", filepath.Join(s.opts.Dir, "cluster")}
	for name, value := range settings {
		args = append(args, "-c", name+"="+value)
	}
	start := time.Now()
	logSize := s.logSize()
	s.cmd = exec.Command(filepath.Join(bin, "postgres"), args...)
	s.cmd.Dir = "/"
	s.cmd.Env = environment(bin)
	s.cmd.SysProcAttr = attr
	s.cmd.Stdout, s.cmd.Stderr = s.opts.Log, s.opts.Log
	if err := s.cmd.Start(); err != nil {
		return err
	}
	if err := s.startJanitor(attr); err != nil {
		s.killGroup()
		_ = s.cmd.Wait()
		return err
	}
	for {
		conn, err := pgx.Connect(ctx, s.DatabaseURL("postgres"))
		if err == nil {
			conn.Close(ctx)
			s.ended = false
			return nil
		}
		var info unix.Siginfo
		died := unix.Waitid(unix.P_PID, s.cmd.Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil) == nil &&
			info.Signo != 0
		switch {
		case died:
			err = fmt.Errorf("the server ended: %s", s.logTail(logSize))
		case ctx.Err() != nil:
			err = ctx.Err()
		case time.Since(start) > s.opts.Wait:
			err = fmt.Errorf("no answer after %s: %w: %s", s.opts.Wait, err, s.logTail(logSize))
		default:
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		s.Kill()
		return err
	}
}

// startJanitor starts a shell that waits for the end of a pipe which only this process holds, and then stops the
// server: it outlives a SIGKILL of this process.
func (s *Server) startJanitor(attr *syscall.SysProcAttr) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close() //nolint:errcheck // nothing is written to it
	const script = `read _
kill -INT "$1" 2>/dev/null
[ -n "$2" ] || exit 0
n=0
while kill -0 "$1" 2>/dev/null && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
rm -rf "$2"`
	remove := ""
	if s.opts.Remove {
		remove = s.opts.Dir
	}
	s.janitor = exec.Command("/bin/sh", "-c", script, "janitor", strconv.Itoa(s.cmd.Process.Pid), remove)
	s.janitor.Dir = "/"
	s.janitor.Stdin = read
	s.janitor.SysProcAttr = attr
	if err := s.janitor.Start(); err != nil {
		return errors.Join(err, write.Close())
	}
	s.pipe = write
	return nil
}

func (s *Server) createDatabase(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, s.DatabaseURL("postgres"))
	if err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	defer conn.Close(ctx)
	var exists bool
	if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_catalog.pg_database WHERE datname = $1)`,
		Database).Scan(&exists); err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	if exists {
		return nil
	}
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{Database}.Sanitize()); err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	return nil
}

func (s *Server) logSize() int64 {
	info, err := s.opts.Log.Stat()
	if err != nil {
		return 0
	}
	return info.Size()
}

// logTail returns what the server logged since the log had the given size, at most its last 2 kB.
func (s *Server) logTail(from int64) string {
	b, err := os.ReadFile(s.opts.Log.Name())
	if err != nil {
		return "see its log"
	}
	if int64(len(b)) > from {
		b = b[from:]
	}
	if len(b) > 2000 {
		b = b[len(b)-2000:]
	}
	return strings.TrimSpace(string(b))
}

// Package natstest runs the real nats-server with JetStream for tests: inside the test's process, as a child
// process that can be killed, or as a cluster of three.
package natstest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// deadline bounds every wait for a server. It is far longer than a server needs, so that a slow machine does not fail a
// test.
const deadline = 60 * time.Second

// maxStore has room for the default streams of several tests on one server. Nothing is written before it is needed.
const maxStore = 256 << 30

// childEnv has the options of a child process as JSON. RunIfChild reads it.
const childEnv = "DECUWATCH_NATSTEST_SERVER"

// Options say how a server runs.
type Options struct {
	Dir        string // of the store. Defaults to a temporary directory
	SyncAlways bool   // flush each write to disk before it is acknowledged
	// run as a child process, which Kill ends by SIGKILL; the test binary's TestMain must call RunIfChild
	Process bool
}

// Server is one nats-server with JetStream on disk. It keeps its port and its store over restarts.
type Server struct {
	t    testing.TB
	opts options

	mu       sync.Mutex
	embedded *server.Server
	process  *exec.Cmd
}

// options are what a child process needs to know.
type options struct {
	Dir         string
	Port        int
	SyncAlways  bool
	process     bool
	Name        string
	ClusterPort int      // 0 if it is not in a cluster
	Routes      []string // of a cluster
}

// Start starts a server inside the test's process on a free loopback port with its store in a temporary
// directory, and stops it when the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	return StartWith(t, Options{})
}

// StartWith starts a server as o says and stops it when the test ends.
func StartWith(t testing.TB, o Options) *Server {
	t.Helper()
	dir := o.Dir
	if dir == "" {
		dir = storeDir(t)
	}
	s := &Server{t: t, opts: options{
		Dir: dir, Port: FreePort(t), SyncAlways: o.SyncAlways, process: o.Process, Name: "natstest",
	}}
	s.start()
	t.Cleanup(s.Stop)
	return s
}

// storeDir returns a directory for a store. The server may still be removing its own files during the test's cleanup,
// so the removal is tried again until it succeeds.
func storeDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "natstest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var err error
		for end := time.Now().Add(deadline); time.Now().Before(end); {
			if err = os.RemoveAll(dir); err == nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("natstest: remove the store: %v", err)
	})
	return dir
}

// URL returns the address for clients.
func (s *Server) URL() string { return fmt.Sprintf("nats://127.0.0.1:%d", s.opts.Port) }

// Address returns host and port, for a proxy in front of the server.
func (s *Server) Address() string { return fmt.Sprintf("127.0.0.1:%d", s.opts.Port) }

// StoreDir returns the directory of the server's store, for a backup of a stopped server.
func (s *Server) StoreDir() string { return s.opts.Dir }

// Connect returns a connection that reconnects without end at short intervals and is closed when the test ends.
func (s *Server) Connect(opts ...nats.Option) *nats.Conn {
	s.t.Helper()
	return Connect(s.t, s.URL(), opts...)
}

// JetStream returns a JetStream context on a connection of its own.
func (s *Server) JetStream() jetstream.JetStream {
	s.t.Helper()
	js, err := jetstream.New(s.Connect())
	if err != nil {
		s.t.Fatalf("natstest: %v", err)
	}
	return js
}

// Connect returns a connection to url that reconnects without end at short intervals and is closed when the test ends.
func Connect(t testing.TB, url string, opts ...nats.Option) *nats.Conn {
	t.Helper()
	all := append([]nats.Option{
		nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond),
		nats.ReconnectJitter(10*time.Millisecond, 10*time.Millisecond),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}, opts...)
	var nc *nats.Conn
	var err error
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if nc, err = nats.Connect(url, all...); err == nil {
			t.Cleanup(nc.Close)
			return nc
		}
	}
	t.Fatalf("natstest: connect to %s: %v", url, err)
	return nil
}

// Kill ends the server at once: by SIGKILL if it is a child process, else by a shutdown without a lame-duck phase.
// Restart starts it again.
func (s *Server) Kill() {
	s.t.Helper()
	s.end(syscall.SIGKILL)
}

// Stop ends the server and waits for it. Stopping a stopped server does nothing.
func (s *Server) Stop() {
	s.t.Helper()
	s.end(syscall.SIGTERM)
}

// Restart starts the server again on the same port and the same store.
func (s *Server) Restart() {
	s.t.Helper()
	s.Stop()
	s.start()
}

func (s *Server) end(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.embedded != nil {
		s.embedded.Shutdown()
		s.embedded.WaitForShutdown()
		s.embedded = nil
	}
	if s.process != nil {
		_ = s.process.Process.Signal(sig)
		_ = s.process.Wait() // its exit status says nothing here
		s.process = nil
	}
}

func (s *Server) running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.embedded != nil || s.process != nil
}

func (s *Server) start() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if s.opts.process {
		s.process, err = startProcess(s.opts)
	} else {
		s.embedded, err = startEmbedded(s.opts)
	}
	if err != nil {
		s.t.Fatalf("natstest: start nats-server: %v", err)
	}
	if s.opts.ClusterPort == 0 {
		waitForJetStream(s.t, s.URL())
	}
}

func startEmbedded(o options) (*server.Server, error) {
	so := &server.Options{
		ServerName: o.Name,
		Host:       "127.0.0.1",
		Port:       o.Port,
		JetStream:  true,
		StoreDir:   o.Dir,
		SyncAlways: o.SyncAlways,
		// Streams reserve their sizes. Without a limit of its own, the server takes three quarters of the disk that is free.
		JetStreamMaxStore: maxStore,
		NoLog:             true,
		NoSigs:            true,
	}
	if o.ClusterPort != 0 {
		so.Cluster = server.ClusterOpts{Name: "natstest", Host: "127.0.0.1", Port: o.ClusterPort}
		for _, r := range o.Routes {
			so.Routes = append(so.Routes, server.RoutesFromStr(r)...)
		}
	}
	var last error
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		ns, err := server.NewServer(so)
		if err != nil {
			return nil, err
		}
		ns.Start()
		// If a predecessor has not released the port yet, the accept loop fails and is tried again.
		if ns.ReadyForConnections(10 * time.Second) {
			return ns, nil
		}
		last = fmt.Errorf("not ready on port %d", o.Port)
		ns.Shutdown()
		ns.WaitForShutdown()
	}
	return nil, last
}

func startProcess(o options) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+string(b))
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil { // closed by the parent's death, which ends the child
		return nil, err
	}
	return cmd, cmd.Start()
}

// RunIfChild runs the server and exits if StartWith started this process as a child. Otherwise it returns at once. A
// TestMain whose tests use Options.Process calls it first.
func RunIfChild() {
	v, ok := os.LookupEnv(childEnv)
	if !ok {
		return
	}
	var o options
	if err := json.Unmarshal([]byte(v), &o); err != nil {
		fmt.Fprintln(os.Stderr, "natstest: child:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	ns, err := startEmbedded(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "natstest: child:", err)
		os.Exit(1)
	}
	<-ctx.Done()
	ns.Shutdown()
	ns.WaitForShutdown()
	os.Exit(0)
}

// Cluster is three servers that share one JetStream.
type Cluster struct {
	t       testing.TB
	servers []*Server
}

// StartCluster starts a cluster of three inside the test's process and waits until its JetStream has a leader.
func StartCluster(t testing.TB) *Cluster {
	t.Helper()
	return StartClusterWith(t, Options{})
}

// StartClusterWith is StartCluster with servers that run as o says.
func StartClusterWith(t testing.TB, o Options) *Cluster {
	t.Helper()
	const n = 3
	c := &Cluster{t: t}
	var ports [n]int
	var routes []string
	for i := range ports {
		ports[i] = FreePort(t)
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", ports[i]))
	}
	for i := range ports {
		s := &Server{t: t, opts: options{
			Dir: storeDir(t), Port: FreePort(t), SyncAlways: o.SyncAlways, process: o.Process,
			Name:        fmt.Sprintf("natstest-%d", i),
			ClusterPort: ports[i], Routes: routes,
		}}
		s.start()
		t.Cleanup(s.Stop)
		c.servers = append(c.servers, s)
	}
	waitForJetStream(t, c.URL())
	return c
}

// URL returns the addresses of all three for clients.
func (c *Cluster) URL() string {
	url := c.servers[0].URL()
	for _, s := range c.servers[1:] {
		url += "," + s.URL()
	}
	return url
}

// StreamLeader waits until the stream has a leader, and returns its server.
func (c *Cluster) StreamLeader(stream string) *Server {
	c.t.Helper()
	nc := Connect(c.t, c.URL())
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		c.t.Fatalf("natstest: %v", err)
	}
	leader := func() *Server {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		s, err := js.Stream(ctx, stream)
		if err != nil || s.CachedInfo().Cluster == nil {
			return nil
		}
		for _, server := range c.servers {
			if server.opts.Name == s.CachedInfo().Cluster.Leader && server.running() { // the others may not have noticed yet
				return server
			}
		}
		return nil
	}
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if s := leader(); s != nil {
			return s
		}
	}
	c.t.Fatalf("natstest: stream %s has no leader after %s", stream, deadline)
	return nil
}

// waitForJetStream waits until JetStream answers. In a cluster it also waits until a stream of three replicas can be
// placed.
func waitForJetStream(t testing.TB, url string) {
	t.Helper()
	nc := Connect(t, url)
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatalf("natstest: %v", err)
	}
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = answers(js); err == nil {
			return
		}
	}
	t.Fatalf("natstest: JetStream does not answer after %s: %v", deadline, err)
}

func answers(js jetstream.JetStream) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_, err := js.AccountInfo(ctx)
	return err
}

// FreePort returns a free loopback port. It is below the range of outgoing connections, so that none of them takes it
// while a server is restarted.
func FreePort(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := 10000 + rand.IntN(20000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("natstest: found no free port")
	return 0
}

// Until calls condition at short intervals until it is true. It fails the test after a minute, which is longer than
// anything should take. It is the only wait of the fault tests.
func Until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if condition() {
			return
		}
	}
	t.Fatalf("%s: not so after %s", what, deadline)
}

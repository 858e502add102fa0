package natstest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
)

// Secrets runs the command of a folder that makes a deployment's secrets, and returns their directory.
func Secrets(t testing.TB, folder string, args ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "secrets")
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"run", folder, "-dir", dir}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

// Shipped returns the options of a configuration file that names users by their secrets. Only ports and paths are the
// test's.
func Shipped(t testing.TB, conf, secrets string) *server.Options {
	t.Helper()
	content, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(secrets, "nats"), filepath.Join(dir, "secrets")); err != nil {
		t.Fatal(err)
	}
	// Inside its container the server reads the certificate there.
	file := filepath.Join(secrets, "nats/tls.conf")
	tls, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	tls = []byte(strings.ReplaceAll(string(tls), "/etc/nats/secrets", filepath.Join(secrets, "nats")))
	if err := os.WriteFile(file, tls, 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, filepath.Base(conf))
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	opts, err := server.ProcessConfigFile(path)
	if err != nil {
		t.Fatal(err)
	}
	opts.Host, opts.Port, opts.StoreDir, opts.NoSigs, opts.NoLog = "127.0.0.1", server.RANDOM_PORT, storeDir(t), true, true
	return opts
}

// Run runs a server with options, and stops it when the test ends.
func Run(t testing.TB, opts *server.Options) *server.Server {
	t.Helper()
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(deadline) {
		t.Fatal("natstest: the server is not ready")
	}
	return s
}

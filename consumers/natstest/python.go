package natstest

import (
	"os"
	"path/filepath"
	"testing"
)

// Python returns the value of PYTHONPATH with which python3 finds the client nats-py: the environment variable
// DECUWATCH_NATS_PY, or what scripts/fetch-nats-py put into .tools of this directory or one above. It fails the test if
// there is neither.
func Python(t testing.TB) string {
	t.Helper()
	if path := os.Getenv("DECUWATCH_NATS_PY"); path != "" {
		return path
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatalf("natstest: %v", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		found, err := filepath.Glob(filepath.Join(dir, ".tools", "nats-py-*"))
		if err != nil {
			t.Fatalf("natstest: %v", err)
		}
		if len(found) > 0 {
			return found[len(found)-1]
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("natstest: nats-py is missing: run scripts/fetch-nats-py")
		}
	}
}

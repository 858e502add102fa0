package main

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// TestSecretsStay shows that a second run changes no secret.
func TestSecretsStay(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	read := func() map[string]string {
		if err := run([]string{"-dir", dir}, io.Discard); err != nil {
			t.Fatal(err)
		}
		files := map[string]string{}
		for _, pattern := range []string{"*", "nats/*"} {
			found, _ := filepath.Glob(filepath.Join(dir, pattern))
			for _, path := range found {
				if info, err := os.Stat(path); err == nil && !info.IsDir() {
					b, err := os.ReadFile(path)
					if err != nil {
						t.Fatal(err)
					}
					files[path] = string(b)
				}
			}
		}
		return files
	}
	first, second := read(), read()
	if len(first) < len(users)+len(passwords)+4 {
		t.Fatalf("%d files", len(first))
	}
	for path, content := range first {
		if second[path] != content {
			t.Errorf("%s changed", path)
		}
	}
	seen := map[string]string{}
	for path, content := range first {
		if other := seen[content]; other != "" {
			t.Errorf("%s and %s hold the same", path, other)
		}
		seen[content] = path
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v: others can open the directory", info.Mode(), err)
	}
}

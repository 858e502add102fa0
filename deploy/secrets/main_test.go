package main

import (
	"io"
	"os"
	"path/filepath"
	"syscall"
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

// TestModesDoNotDependOnTheUmask runs with umasks that close files, over nothing and over files that are closed
// already.
func TestModesDoNotDependOnTheUmask(t *testing.T) {
	before := syscall.Umask(0o077)
	defer syscall.Umask(before)
	for _, args := range [][]string{nil, {"-tls", "localhost"}} {
		dir := filepath.Join(t.TempDir(), "secrets")
		for range 2 {
			if err := run(append([]string{"-dir", dir}, args...), io.Discard); err != nil {
				t.Fatal(err)
			}
			files := 0
			err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
				if err != nil {
					return err
				}
				info, err := entry.Info()
				if err != nil {
					return err
				}
				want := os.FileMode(0o644)
				switch {
				case path == dir:
					want = 0o700
				case entry.IsDir():
					want = 0o755
				default:
					files++
				}
				if info.Mode().Perm() != want {
					t.Errorf("%s has mode %v, want %v", path, info.Mode().Perm(), want)
				}
				if !entry.IsDir() {
					return os.Chmod(path, 0o600) // as an older version left it
				}
				return nil
			})
			if err != nil || files < len(users)+len(passwords)+4 {
				t.Fatalf("%d files, %v", files, err)
			}
			args = nil // the second run keeps what is there
		}
	}
}

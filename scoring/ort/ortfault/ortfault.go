// Package ortfault is an ONNX Runtime for tests that errs, hangs and returns NaN on demand, in a process that the test
// started with it.
package ortfault

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/scoring/ort"
)

// Mode is what becomes of a run of a session.
type Mode string

const (
	OK    Mode = "ok"    // it runs
	Error Mode = "error" // it fails at once
	Hang  Mode = "hang"  // it does not return, whether or not it is terminated, until another mode is set
	NaN   Mode = "nan"   // it succeeds, and every element of its outputs is NaN
)

// Shim is the library that processes load in place of ONNX Runtime's. All processes with its environment obey it.
type Shim struct {
	t       testing.TB
	library string
	real    string
	file    string
}

// New compiles the library, with the C compiler that cgo uses. Its mode is OK.
func New(t testing.TB) *Shim {
	t.Helper()
	real, err := ort.FindLibrary("")
	if err != nil {
		t.Fatalf("ortfault: %v", err)
	}
	const module = "github.com/decuwatch/decuwatch/scoring/ort/ortfault"
	list := func(args ...string) string {
		out, err := exec.Command("go", args...).Output()
		if err != nil {
			t.Fatalf("ortfault: go %s: %v", strings.Join(args, " "), err)
		}
		return strings.TrimSpace(string(out))
	}
	source, headers := list("list", "-f", "{{.Dir}}", module), list("list", "-m", "-f", "{{.Dir}}",
		"github.com/yalue/onnxruntime_go")
	dir := t.TempDir()
	s := &Shim{t: t, library: filepath.Join(dir, "libortfault.so"), real: real, file: filepath.Join(dir, "mode")}
	compile := exec.Command(list("env", "CC"), "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-I", headers,
		"-o", s.library, filepath.Join(source, "testdata", "shim.c"), "-ldl", "-lpthread", "-lm")
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("ortfault: %v: %s", err, out)
	}
	s.Set(OK)
	return s
}

// Env is what a process needs in its environment to load the library in place of ONNX Runtime's.
func (s *Shim) Env() []string {
	return []string{"DECUWATCH_ONNXRUNTIME_LIB=" + s.library, "ORTFAULT_LIBRARY=" + s.real, "ORTFAULT_FILE=" + s.file}
}

// Set sets the mode of all runs that begin from now on.
func (s *Shim) Set(m Mode) { s.write(string(m)) }

// SetNext sets the mode of the next runs of a process; those after them are OK.
func (s *Shim) SetNext(m Mode, runs int) { s.write(string(m) + " " + strconv.Itoa(runs)) }

func (s *Shim) write(order string) {
	s.t.Helper()
	part := s.file + ".part" // a process reads the old order or the new one, never half of one
	if err := os.WriteFile(part, []byte(order+"\n"), 0o600); err != nil {
		s.t.Fatalf("ortfault: %v", err)
	}
	if err := os.Rename(part, s.file); err != nil {
		s.t.Fatalf("ortfault: %v", err)
	}
}

// Package ort runs the graphs of an ensemble in ONNX Runtime. It is the only package with cgo.
package ort

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	onnx "github.com/yalue/onnxruntime_go"
)

// Version is the release of ONNX Runtime that this package is built for. Load accepts other releases with the same C
// interface.
const Version = "1.27.0"

// toolPath is where scripts/fetch-onnxruntime puts the library, below the checkout.
const toolPath = ".tools/onnxruntime-" + Version + "/libonnxruntime.so.1"

// FindLibrary returns the path of ONNX Runtime's shared library. It takes the explicit path if there is one, else the
// environment variable DECUWATCH_ONNXRUNTIME_LIB or ONNXRUNTIME_LIB. Else it looks for the library that
// scripts/fetch-onnxruntime fetched (in the working directory and above it), beside the program, and in the system's
// folders. The error lists where it looked.
func FindLibrary(explicit string) (string, error) {
	for _, given := range []struct{ from, path string }{
		{"the configured path", explicit},
		{"DECUWATCH_ONNXRUNTIME_LIB", os.Getenv("DECUWATCH_ONNXRUNTIME_LIB")},
		{"ONNXRUNTIME_LIB", os.Getenv("ONNXRUNTIME_LIB")},
	} {
		if given.path == "" {
			continue
		}
		if !isFile(given.path) {
			return "", fmt.Errorf("find ONNX Runtime: %s names %q, which is not a file", given.from, given.path)
		}
		return filepath.Abs(given.path)
	}
	var candidates []string
	if dir, err := os.Getwd(); err == nil {
		for {
			candidates = append(candidates, filepath.Join(dir, toolPath))
			parent := filepath.Dir(dir)
			if parent == dir {
				break
			}
			dir = parent
		}
	}
	if program, err := os.Executable(); err == nil {
		candidates = append(candidates, filepath.Join(filepath.Dir(program), "libonnxruntime.so.1"))
	}
	for _, dir := range []string{"/usr/local/lib", "/usr/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu",
		"/opt/onnxruntime/lib"} {
		candidates = append(candidates, filepath.Join(dir, "libonnxruntime.so.1"), filepath.Join(dir, "libonnxruntime.so"))
	}
	for _, path := range candidates {
		if isFile(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("find ONNX Runtime: no libonnxruntime.so; run scripts/fetch-onnxruntime or set "+
		"DECUWATCH_ONNXRUNTIME_LIB (looked for %s in the working directory and above it, beside the program and in the "+
		"system's library folders)", toolPath)
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

var library struct {
	sync.Mutex
	path string
}

// Load loads the shared library once for the life of the process; ONNX Runtime keeps threads and state, so it is never
// unloaded. Loading another path afterwards is an error.
func Load(path string) error {
	library.Lock()
	defer library.Unlock()
	if library.path != "" {
		if library.path != path {
			return fmt.Errorf("load ONNX Runtime %s: this process has already loaded %s", path, library.path)
		}
		return nil
	}
	onnx.SetSharedLibraryPath(path)
	if err := keepSignals(func() error { return onnx.InitializeEnvironment(onnx.WithLogLevelError()) }); err != nil {
		return fmt.Errorf("load ONNX Runtime %s (release %s is needed): %w", path, Version, err)
	}
	library.path = path
	return nil
}

// Runtime returns name and release of the loaded library, "onnxruntime 1.27.0", or "" before Load.
func Runtime() string {
	if !onnx.IsInitialized() {
		return ""
	}
	return "onnxruntime " + onnx.GetVersion()
}

// ErrTerminated is returned by a run that Terminate cut short.
var ErrTerminated = errors.New("run was terminated")

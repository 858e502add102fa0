package main

import (
	"fmt"
	"runtime"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/scoring/ort"
)

// What was built, set by -ldflags "-X main.version=v1.2.3 -X main.revision=0123abc". Without them it is what Go
// recorded.
var version, revision string

// built returns the version and the revision of the program, or "unknown".
func built() (string, string) { return app.Built(version, revision) }

type versionCmd struct{}

func (versionCmd) Run(s *streams) error {
	version, revision := built()
	_, err := fmt.Fprintf(s.out, "decuwatch %s (%.12s), %s %s/%s, for ONNX Runtime %s\n", version, revision,
		runtime.Version(), runtime.GOOS, runtime.GOARCH, ort.Version)
	return err
}

package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/decuwatch/decuwatch/scoring/ort"
)

// What was built, set by -ldflags "-X main.version=v1.2.3 -X main.revision=0123abc". Without them it is what Go
// recorded.
var version, revision string

// built returns the version and the revision of the program, or "unknown".
func built() (string, string) {
	recorded, commit := "", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		recorded = info.Main.Version
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				commit = setting.Value
			}
		}
	}
	return cmp.Or(version, recorded, "unknown"), cmp.Or(revision, commit, "unknown")
}

type versionCmd struct{}

func (versionCmd) Run(s *streams) error {
	version, revision := built()
	_, err := fmt.Fprintf(s.out, "decuwatch %s (%.12s), %s %s/%s, for ONNX Runtime %s\n", version, revision,
		runtime.Version(), runtime.GOOS, runtime.GOARCH, ort.Version)
	return err
}

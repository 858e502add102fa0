package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/decuwatch/decuwatch/scoring/ort"
)

type versionCmd struct{}

func (versionCmd) Run(s *streams) error {
	version, revision := "unknown", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				revision = " (" + setting.Value[:min(12, len(setting.Value))] + ")"
			}
		}
	}
	_, err := fmt.Fprintf(s.out, "decuwatch %s%s, %s %s/%s, for ONNX Runtime %s\n", version, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH, ort.Version)
	return err
}

package app

import (
	"cmp"
	"runtime/debug"
)

// Built returns the version and the revision of the program: those that the linker set, else those that Go recorded,
// else "unknown".
func Built(version, revision string) (string, string) {
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

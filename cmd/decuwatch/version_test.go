package main

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/internal/app"
)

// TestVersion checks that the program and its metrics report the version of the build's flags, and that the Makefile
// and the Dockerfile set variables that exist.
func TestVersion(t *testing.T) {
	defer func(v, r string) { version, revision = v, r }(version, revision)
	version, revision = "v9.8.7", "0123456789abcdef"
	var out bytes.Buffer
	if err := (versionCmd{}).Run(&streams{out: &out}); err != nil || !strings.HasPrefix(out.String(),
		"decuwatch v9.8.7 (0123456789ab), go") {
		t.Errorf("%q, %v", out.String(), err)
	}
	families, err := app.NewRegistry(built()).Gather()
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{}
	for _, f := range families {
		if f.GetName() == "decuwatch_build_info" {
			for _, l := range f.GetMetric()[0].GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
		}
	}
	if labels["version"] != "v9.8.7" || labels["revision"] != "0123456789abcdef" {
		t.Errorf("decuwatch_build_info %v", labels)
	}
	for _, file := range []string{"../../Makefile", "../../deploy/Dockerfile"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(`-X main\.(\w+)=`).FindAllStringSubmatch(string(text), -1)
		if len(found) != 2 || found[0][1] != "version" || found[1][1] != "revision" {
			t.Errorf("%s sets %v", file, found)
		}
	}
}

package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/decuwatch/decuwatch/"

// arrows are the packages and what they may import of this module. A folder stands for what lies below it, too,
// unless that has a line of its own. What is not listed is forbidden, for the reason beside it.
var arrows = []struct {
	pkg    string
	may    []string
	reason string
}{
	{"schema", []string{"internal/modelname"}, "the formats are what everybody else stands on"},
	{"schema/postgres", []string{
		"internal/backoff", "internal/settings", "schema",
	}, "queries know the formats, and nobody who asks"},
	{"schema/postgres/local", []string{
		"schema/postgres",
	}, "a server for the demo and the tests knows nothing of events"},
	{"schema/postgres/pgtest", []string{
		"schema", "schema/postgres", "schema/postgres/local",
	}, "a test helper of the queries"},
	{"scoring", []string{
		"internal/settings", "scoring/paide", "scoring/diffusion", "scoring/ensemble", "scoring/ort",
	}, "a score does not depend on how a request came or where the score goes"},
	{"scoring/paide", nil, "estimators are numbers in, numbers out"},
	{"scoring/diffusion", nil, "schedules and noise are numbers in, numbers out"},
	{"scoring/evaluation", []string{
		"internal/settings", "internal/terminal", "schema", "scoring", "scoring/ensemble", "alerts/calibration",
	}, "an evaluation runs an engine and calibrates as production does; it needs neither events nor a database"},
	{"scoring/ensemble", []string{
		"internal/modelname", "scoring/diffusion",
	}, "the ensemble directory is read without running anything"},
	{"scoring/ort", nil, "the runtime runs graphs and knows neither ensembles nor scores"},
	{"scoring/ort/ortfault", []string{"scoring/ort"}, "a runtime for tests"},
	{"consumers", []string{
		"internal/backoff", "internal/modelname", "internal/settings", "internal/stage", "schema",
	}, "delivery must not know what is done with an event, nor the monitor how it came"},
	{"consumers/natstest", nil, "a server for tests"},
	{"alerts", []string{
		"internal/backoff", "internal/settings", "internal/stage", "internal/terminal", "schema",
	}, "the decision is pure; the outbox is an interface"},
	{"alerts/calibration", []string{"internal/terminal", "schema", "alerts"}, "samples and thresholds in, a plan out"},
	{"alerts/watch", []string{
		"internal/backoff", "internal/terminal", "schema", "consumers",
	}, "a subscriber reads the stream of alerts and nothing else"},
	{"monitor", []string{
		"internal/stage", "schema", "scoring", "scoring/diffusion", "alerts", "monitor/sampling",
	}, "the one sequence knows neither JetStream nor Postgres; cmd hands them over"},
	{"monitor/sampling", []string{
		"internal/modelname", "internal/settings", "schema",
	}, "a lot depends on rules, a salt and the event's identity, and on nothing that changes"},
	{"monitor/budget", []string{
		"internal/modelname", "internal/settings", "schema", "schema/postgres",
	}, "workers share their rows through the database, and know neither requests nor scores"},
	{"monitor/reconcile", []string{
		"internal/terminal", "schema", "schema/postgres", "consumers",
	}, "both sides are read, and nobody writes"},
	{"monitor/redeliver", []string{
		"internal/terminal", "schema", "schema/postgres", "consumers",
	}, "an operator's act, between the two sides"},
	{"monitor/replay", []string{
		"internal/terminal", "schema", "scoring", "scoring/ensemble", "monitor",
	}, "the one way from a receipt back to a request"},
	{"monitor/rescore", []string{
		"internal/backoff", "internal/settings", "schema", "schema/postgres", "monitor", "monitor/sampling",
	}, "stored events come again through a queue of their own, behind live work"},
	{"monitor/compare", []string{
		"internal/terminal", "schema", "alerts", "scoring/evaluation",
	}, "two scores of an event in, a comparison out"},
	{"monitor/canary", []string{
		"schema", "schema/postgres", "scoring/ensemble",
	}, "a watchdog knows neither how events are scored nor who reviews them"},
	{"review", []string{
		"internal/backoff", "internal/settings", "internal/terminal", "schema", "schema/postgres", "alerts",
		"scoring", "scoring/ensemble", "monitor/replay",
	}, "review comes after the verdict and takes no part in it"},
	{"internal/backoff", nil, "how retries are spaced out"},
	{"internal/modelname", nil, "the one rule for the names of models"},
	{"internal/stage", nil, "the histogram that several packages share"},
	{"internal/settings", nil, "what the owners of settings share"},
	{"internal/terminal", nil, "how text is printed for people"},
	{"internal/app", []string{
		"internal/backoff", "internal/settings", "schema", "schema/postgres", "scoring", "scoring/ensemble", "consumers",
		"alerts", "alerts/calibration", "monitor", "monitor/budget", "monitor/canary", "monitor/rescore",
		"monitor/sampling", "review",
	}, "wires everything; nobody but cmd may know it"},
	{"internal/demo", []string{
		"internal/app", "internal/settings", "internal/terminal", "schema", "schema/postgres", "schema/postgres/local",
		"scoring/ensemble", "consumers", "alerts", "alerts/watch", "monitor/reconcile",
	}, "runs the monitor as cmd does, and works for nobody else"},
	{"internal/faults", nil, "the fault matrix, in tests only"},
	{"deploy", nil, "files, held against the code by tests"},
	{"cmd/decuwatch", []string{
		"internal/app", "internal/demo", "internal/settings", "internal/terminal", "schema", "schema/postgres",
		"scoring", "scoring/ensemble", "scoring/ort", "scoring/diffusion", "scoring/evaluation", "consumers", "alerts",
		"alerts/calibration", "alerts/watch", "monitor", "monitor/canary", "monitor/compare", "monitor/reconcile",
		"monitor/redeliver", "monitor/replay", "monitor/rescore", "review", "internal/modelname",
	}, "wires everything, tests' helpers excepted"},
}

// goPackage is what `go list -json` says of a package.
type goPackage struct {
	ImportPath string
	Imports    []string
	CgoFiles   []string
}

func TestImportArrows(t *testing.T) {
	for _, p := range list(t) {
		name, ours := strings.CutPrefix(p.ImportPath, module)
		if !ours {
			continue
		}
		if longest(name) < 0 {
			t.Errorf("package %s has no place in the list of arrows", name)
			continue
		}
		for _, imported := range p.Imports {
			if other, ours := strings.CutPrefix(imported, module); ours && !allowed(name, other) {
				arrow := arrows[longest(name)]
				t.Errorf("%s imports %s, but %s (it may import %q)", name, other, arrow.reason, arrow.may)
			}
		}
		if len(p.CgoFiles) > 0 && name != "scoring/ort" && !strings.HasPrefix(name, "scoring/ort/") {
			t.Errorf("%s uses cgo; only scoring/ort may", name)
		}
	}
}

// TestArchitectureNamesEveryPackage looks for each package in docs/architecture.md.
func TestArchitectureNamesEveryPackage(t *testing.T) {
	page, err := os.ReadFile("../../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, arrow := range arrows {
		if !strings.Contains(string(page), "`"+arrow.pkg+"`") {
			t.Errorf("docs/architecture.md does not name %s", arrow.pkg)
		}
	}
}

func TestArrowsRefuse(t *testing.T) {
	for _, c := range [][2]string{
		{"schema", "schema/postgres"}, {"schema/postgres", "monitor"}, {"consumers", "monitor"},
		{"consumers", "consumers/natstest"},
		{"monitor", "consumers"}, {"monitor", "schema/postgres"}, {"alerts", "schema/postgres"}, {"scoring", "schema"},
		{"scoring/paide", "scoring/diffusion"}, {"scoring/ort", "scoring"}, {"scoring", "scoring/ort/ortfault"},
		{"cmd/decuwatch", "schema/postgres/pgtest"},
	} {
		if allowed(c[0], c[1]) {
			t.Errorf("%s may import %s", c[0], c[1])
		}
	}
}

// allowed reports whether the package name may import other.
func allowed(name, other string) bool {
	i := longest(name)
	if longest(other) == i { // of one folder
		return true
	}
	return longest(other) >= 0 && slices.Contains(arrows[i].may, arrows[longest(other)].pkg)
}

// below reports whether name is the folder or lies below it.
func below(name, folder string) bool { return name == folder || strings.HasPrefix(name, folder+"/") }

// longest returns the index of the arrow with the longest folder that holds name, or -1.
func longest(name string) int {
	best := -1
	for i, a := range arrows {
		if below(name, a.pkg) && (best < 0 || len(a.pkg) > len(arrows[best].pkg)) {
			best = i
		}
	}
	return best
}

func list(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,CgoFiles", module+"...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.Bytes())
	}
	var packages []goPackage
	for in := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		err := in.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
	if len(packages) < 10 {
		t.Fatalf("go list found %d packages only", len(packages))
	}
	return packages
}

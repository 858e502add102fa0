package deploy

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/scoring"
)

var (
	heading  = regexp.MustCompile(`(?m)^#{1,6} +(.+?) *#*$`)
	link     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	fence    = regexp.MustCompile("(?ms)^```.*?^```[^\n]*$")
	inline   = regexp.MustCompile("`[^`\n]*`")
	unspoken = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// anchors returns the anchors of a document's headings, as GitHub makes them.
func anchors(text string) map[string]bool {
	all := map[string]bool{}
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		title := link.ReplaceAllString(m[1], "]") // a linked heading is known by its text
		all[strings.ReplaceAll(unspoken.ReplaceAllString(strings.ToLower(title), ""), " ", "-")] = true
	}
	return all
}

// TestProductionSizes computes the table of docs/production.md from its formulas and the shipped ensemble's rows.
func TestProductionSizes(t *testing.T) {
	engine, err := scoring.Open("../ensembles/fashion-mnist", scoring.Options{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	}()
	rowsOfEvent := float64(engine.Rows(scoring.Request{}))
	content, err := os.ReadFile("../docs/production.md")
	if err != nil {
		t.Fatal(err)
	}
	number := func(cell string) float64 {
		n, err := strconv.ParseFloat(strings.NewReplacer(",", "", " GB", "").Replace(strings.TrimSpace(cell)), 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if said := fmt.Sprintf("With %g rows an event", rowsOfEvent); !strings.Contains(string(content), said) {
		t.Errorf("docs/production.md does not say %q", said)
	}
	const day, rowsOfDevice = 86400, 1150
	rows := regexp.MustCompile(`(?m)^\| [0-9][0-9,]* \|.*\|$`).FindAllString(string(content), -1)
	if len(rows) != 4 {
		t.Fatalf("%d rows", len(rows))
	}
	for _, row := range rows {
		cells := strings.Split(strings.Trim(row, "| "), "|")
		events := number(cells[0])
		for i, want := range []float64{
			events * day, events * rowsOfEvent, math.Ceil(events * rowsOfEvent / (rowsOfDevice * 0.7)),
			math.Round(0.5*events*(day+8*3600)/1e5) / 10, math.Round(2.2 * events * 30 * day / 1e6),
		} {
			if got := number(cells[i+1]); got != want {
				t.Errorf("%s: column %d is %g, want %g", row, i+2, got, want)
			}
		}
	}
}

// TestLinks follows every relative link of the documents: files are there, and so are headings.
func TestLinks(t *testing.T) {
	paths, err := filepath.Glob("../docs/*.md")
	if err != nil || len(paths) < 8 {
		t.Fatalf("%v, %v", paths, err)
	}
	paths = append(paths, "../README.md", "../CONTRIBUTING.md", "../SECURITY.md")
	n := 0
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
			continue
		}
		text := inline.ReplaceAllString(fence.ReplaceAllString(string(content), ""), "")
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			n++
			file, anchor, _ := strings.Cut(m[1], "#")
			target := path
			if file != "" {
				target = filepath.Join(filepath.Dir(path), file)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: link to %s: there is no such file", path, m[1])
				continue
			}
			if anchor == "" || !strings.HasSuffix(target, ".md") {
				continue
			}
			content, err := os.ReadFile(target)
			if err != nil {
				t.Fatal(err)
			}
			if !anchors(string(content))[anchor] {
				t.Errorf("%s: link to %s: there is no such heading", path, m[1])
			}
		}
	}
	if n < 20 {
		t.Errorf("%d links", n)
	}
}

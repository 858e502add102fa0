package faults

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/consumers/natstest"
)

var (
	flagAll      = flag.Bool("all", false, "run every scenario, not only the quick ones")
	flagScenario = flag.String("scenario", "", "run the scenarios of these names, separated by commas")
	flagSeed     = flag.Uint64("seed", 0, "first seed; 0 draws one")
	flagSeeds    = flag.Int("seeds", 0, "runs of each scenario; 0 is one of each")
	flagReport   = flag.String("report", "", "write the results to this file as JSON")
	flagBinary   = flag.String("binary", "", "test this decuwatch instead of building it")
	flagOld      = flag.String("old", "", "binary of the version before, for the scenario rolling-upgrade")
)

// decuwatch is the binary under test.
var decuwatch string

func TestMain(m *testing.M) {
	natstest.RunIfChild()
	flag.Parse()
	os.Exit(campaign(m))
}

func campaign(m *testing.M) int {
	dir, err := os.MkdirTemp("", "faults")
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	// An interrupt ends the campaign's children, too: they end with this process.
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		fmt.Println("interrupted:")
		reporting.Lock()
		undo := undone
		reporting.Unlock()
		for _, f := range undo {
			_ = f() // nobody can be told any more
		}
		_ = errors.Join(summarize(), os.RemoveAll(dir))
		os.Exit(1)
	}()
	if decuwatch = *flagBinary; decuwatch == "" {
		if decuwatch, err = build(dir); err != nil {
			fmt.Fprintln(os.Stderr, "faults:", err)
			return 1
		}
	} else if decuwatch, err = filepath.Abs(decuwatch); err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		return 1
	}
	code := m.Run()
	if err := summarize(); err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		return 1
	}
	return code
}

// scenario is one way to break things. Its runs share servers, which setup starts.
type scenario struct {
	name string
	does string
	// quick scenarios run in `go test`: they take seconds, and need neither root nor another binary.
	quick bool
	// kill scenarios have faults at a moment that a seed draws, so they are worth many seeds. The others run for a tenth
	// of -seeds.
	kill bool
	// setup starts or finds the servers. t outlives the scenarios.
	setup func(t *testing.T) *servers
	run   func(r *run)
}

func (s scenario) runs() int {
	if s.kill {
		return max(1, *flagSeeds)
	}
	return max(1, *flagSeeds/10)
}

func scenarios() []scenario {
	return slices.Concat(workerScenarios(), natsScenarios(), postgresScenarios(), streamScenarios(), deviceScenarios())
}

// TestFaults runs the scenarios that the flags choose.
func TestFaults(t *testing.T) {
	names := map[string]bool{}
	for _, s := range scenarios() {
		names[s.name] = true
	}
	chosen := map[string]bool{}
	for _, name := range strings.FieldsFunc(*flagScenario, func(r rune) bool { return r == ',' || r == ' ' }) {
		if !names[name] {
			t.Fatalf("unknown scenario %q", name)
		}
		chosen[name] = true
	}
	first := *flagSeed
	if first == 0 {
		first = 1 + rand.Uint64N(1<<32)
	}
	for _, s := range scenarios() {
		if len(chosen) > 0 && !chosen[s.name] || len(chosen) == 0 && !*flagAll && !s.quick {
			continue
		}
		on := s.setup(t)
		t.Run(s.name, func(t *testing.T) {
			for seed := first; seed < first+uint64(s.runs()); seed++ { //nolint:gosec // small
				t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { s.once(t, on, seed) })
			}
		})
	}
}

// Every scenario has its row in docs/reliability.md, and every row its scenario.
func TestScenariosAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/reliability.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows, names []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\| [^0-9]").FindAllStringSubmatch(string(page), -1) {
		rows = append(rows, m[1])
	}
	for _, s := range scenarios() {
		names = append(names, s.name)
	}
	slices.Sort(rows)
	slices.Sort(names)
	if !slices.Equal(rows, names) {
		t.Errorf("docs/reliability.md describes\n%q\nand the scenarios are\n%q", rows, names)
	}
}

// result is what one run found.
type result struct {
	Scenario    string   `json:"scenario"`
	Seed        uint64   `json:"seed"`
	Events      int      `json:"events"` // messages that the stream acknowledged
	Alerts      int      `json:"alerts"`
	Faults      []string `json:"faults"`
	Redelivered int      `json:"redelivered"` // events whose verdict came after the first delivery
	Drain       float64  `json:"drain_seconds"`
	Seconds     float64  `json:"seconds"`
	Violations  []string `json:"violations"`
}

var (
	reporting sync.Mutex
	results   []result
	undone    []func() error // undoes faults after an interruption; may be called twice
)

// interruption calls f if the campaign is interrupted. An interruption runs no cleanup of the tests.
func interruption(f func() error) {
	reporting.Lock()
	defer reporting.Unlock()
	undone = append(undone, f)
}

// once runs a scenario with one seed and reports it.
func (s scenario) once(t *testing.T, on *servers, seed uint64) {
	began := time.Now()
	r := newRun(t, on, seed)
	defer func() {
		res := result{
			Scenario: s.name, Seed: seed, Events: r.producer.count(), Alerts: r.alerts, Faults: r.faults,
			Redelivered: r.redelivered, Drain: r.drain.Seconds(), Seconds: time.Since(began).Seconds(), Violations: r.violations,
		}
		if t.Failed() && len(res.Violations) == 0 {
			res.Violations = []string{"the run broke off: see the log"}
		}
		reporting.Lock()
		defer reporting.Unlock()
		results = append(results, res)
		verdict := "ok"
		if len(res.Violations) > 0 {
			verdict = fmt.Sprintf("%d VIOLATIONS, replay: make faults SCENARIO=%s SEED=%d", len(res.Violations), s.name, seed)
		}
		fmt.Printf("%-22s seed=%d events=%d alerts=%d faults=%d redelivered=%d drain=%.1fs took=%.1fs %s\n",
			s.name, seed, res.Events, res.Alerts, len(res.Faults), res.Redelivered, res.Drain, res.Seconds, verdict)
		for _, v := range res.Violations {
			fmt.Printf("    %s\n", v)
		}
		if len(res.Violations) > 0 {
			fmt.Printf("    faults: %s\n", strings.Join(res.Faults, "; "))
		}
	}()
	s.run(r)
}

// summarize prints one line for each scenario, and writes the report.
func summarize() error {
	reporting.Lock()
	defer reporting.Unlock()
	if len(results) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "\nscenario\truns\tevents\tfaults\tviolations\tredelivered\tworst drain\tseeds")
	var order []string
	rows := map[string][]result{}
	for _, r := range results {
		if rows[r.Scenario] == nil {
			order = append(order, r.Scenario)
		}
		rows[r.Scenario] = append(rows[r.Scenario], r)
	}
	for _, name := range order {
		var events, faults, violations, redelivered int
		var drain float64
		for _, r := range rows[name] {
			events += r.Events
			faults += len(r.Faults)
			violations += len(r.Violations)
			redelivered += r.Redelivered
			drain = max(drain, r.Drain)
		}
		first, last := rows[name][0].Seed, rows[name][len(rows[name])-1].Seed
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%.1fs\t%d-%d\n",
			name, len(rows[name]), events, faults, violations, redelivered, drain, first, last)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if *flagReport == "" {
		return nil
	}
	body, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*flagReport, append(body, '\n'), 0o644) //nolint:gosec // a report is for everybody
}

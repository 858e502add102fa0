package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/ort"
	"github.com/decuwatch/decuwatch/scoring/paide"
)

// What is measured: the shipped ensemble on the CPU, or what the environment names.
var (
	benchEnsemble = environment("DECUWATCH_BENCH_ENSEMBLE", "../../ensembles/fashion-mnist")
	benchDevice   = environment("DECUWATCH_BENCH_DEVICE", "cpu")
)

func environment(name, or string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return or
}

// cell is one row of the table. Each round measures every cell, so that other load on the machine affects all cells
// alike. The table shows medians over the rounds, and medians of the ratios within a round.
type cell struct {
	name    string
	unit    string
	measure func(d time.Duration) rate
	rates   []rate
}

// rate is work per second, by the clock and by the CPU time of the process that did it. On a machine with other load,
// compare the CPU time.
type rate struct{ wall, cpu float64 }

// meter measures the rate at which a count grows.
type meter struct {
	count func() float64
	from  float64
	began time.Time
	spent time.Duration
}

func startMeter(count func() float64) *meter {
	return &meter{count, count(), time.Now(), cpuTime()}
}

func (m *meter) rate() rate {
	n := m.count() - m.from
	return rate{n / time.Since(m.began).Seconds(), n / (cpuTime() - m.spent).Seconds()}
}

// cpuTime returns the CPU time of this process.
func cpuTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func walls(rates []rate) (v []float64) {
	for _, r := range rates {
		v = append(v, r.wall)
	}
	return v
}

func cpus(rates []rate) (v []float64) {
	for _, r := range rates {
		v = append(v, r.cpu)
	}
	return v
}

// BenchmarkTable prints the tables of docs/performance.md. make bench runs it once. Environment:
// DECUWATCH_BENCH_ROUNDS (defaults to 5), DECUWATCH_BENCH_SECONDS of each measurement (defaults to 2),
// DECUWATCH_BENCH_PYTHON (a Python with PyTorch; without it the rows of the reference are left out),
// DECUWATCH_BENCH_TORCH_THREADS (defaults to GOMAXPROCS; if other processes use the CPUs, PyTorch's threads wait for
// each other, and 1 is the fair choice), DECUWATCH_BENCH_TORCH_ARGS (more arguments of decuwatch-train bench),
// DECUWATCH_BENCH_SETTINGS=1 (the table of settings instead), DECUWATCH_BENCH_ONLY (a regular expression of the rows
// to measure), DECUWATCH_BENCH_ENSEMBLE and DECUWATCH_BENCH_DEVICE (what is measured, and where),
// DECUWATCH_BENCH_BEFORE (another ensemble, whose scores a second are measured in the same run),
// DECUWATCH_BENCH_SESSIONS (of the backbone; defaults to 1), DECUWATCH_BENCH_SERVERS=no (leaves out what needs NATS and
// PostgreSQL), DECUWATCH_BENCH_TORCH_RAW=1 (PyTorch's runs of the network instead of its scores, on a GPU),
// DECUWATCH_BENCH_PRICE (of an hour of a CPU, or of the GPU: adds the cost of a million scores),
// DECUWATCH_BENCH_GMAC (of one row) with DECUWATCH_BENCH_PEAK_TFLOPS (of the chip): adds the share of the chip's
// matrix rate.
func BenchmarkTable(b *testing.B) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	rounds, seconds := benchNumber(b, "DECUWATCH_BENCH_ROUNDS", 5), benchNumber(b, "DECUWATCH_BENCH_SECONDS", 2)
	cells := []*cell{}
	if os.Getenv("DECUWATCH_BENCH_SETTINGS") != "" {
		cells = settingCells(b)
	} else {
		cells = append(cells, rawCells(b)...)
		cells = append(cells, samplerCells(b)...)
		if os.Getenv("DECUWATCH_BENCH_SERVERS") != "no" {
			cells = append(cells, pipelineCells(b, benchEnsemble, "")...)
			if before := os.Getenv("DECUWATCH_BENCH_BEFORE"); before != "" {
				cells = append(cells, pipelineCells(b, before, " before")...)
			}
		}
		if os.Getenv("DECUWATCH_BENCH_TORCH_RAW") != "" {
			cells = append(cells, rawReferenceCells(b)...)
		} else {
			cells = append(cells, referenceCells(b)...)
		}
	}
	if only := os.Getenv("DECUWATCH_BENCH_ONLY"); only != "" {
		chosen, err := regexp.Compile(only)
		if err != nil {
			b.Fatalf("DECUWATCH_BENCH_ONLY: %v", err)
		}
		cells = slices.DeleteFunc(cells, func(c *cell) bool { return !chosen.MatchString(c.name) })
		if len(cells) == 0 {
			b.Fatalf("DECUWATCH_BENCH_ONLY=%s matches no row", only)
		}
	}
	for b.Loop() { // once: -benchtime=1x
		for round := range int(rounds) {
			for _, c := range cells {
				r := c.measure(time.Duration(seconds * float64(time.Second)))
				c.rates = append(c.rates, r)
				fmt.Fprintf(os.Stderr, "round %d of %d: %-60s %9.1f %s, %9.1f per CPU second\n",
					round+1, int(rounds), c.name, r.wall, c.unit, r.cpu)
			}
		}
	}
	ceilings := map[string]*cell{} // by unit: the fastest of the raw runs
	for _, c := range cells {
		best := ceilings[c.unit]
		ceiling := strings.HasPrefix(c.name, "raw") || strings.HasPrefix(c.name, "default")
		if ceiling && (best == nil || median(compared(c.rates)) > median(compared(best.rates))) {
			ceilings[c.unit] = c
		}
	}
	if err := scoresTable(os.Stdout, cells, benchNumber(b, "DECUWATCH_BENCH_PRICE", 0)); err != nil {
		b.Error(err)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', 0)
	fmt.Fprint(w, "\n| what | by the clock | per CPU second | least to most | of the ceiling |\n",
		"|---|---|---|---|---|\n")
	for _, c := range cells {
		share := ""
		other := c.unit == "scores/s" && strings.Contains(c.name, " before") // a score of another ensemble
		if best := ceilings[c.unit]; best != nil && !other {
			share = fmt.Sprintf("%.3f", ratio(c, best))
		}
		fmt.Fprintf(w, "| %s | %.4g %s | %.4g | %.4g to %.4g | %s |\n",
			c.name, median(walls(c.rates)), c.unit, median(cpus(c.rates)),
			slices.Min(cpus(c.rates)), slices.Max(cpus(c.rates)), share)
	}
	w.Flush()
	fmt.Printf("\nThe ceiling is the fastest raw run in the same unit. %d rounds of %g s a cell, interleaved; "+
		"GOMAXPROCS %d; peak memory of the process %.0f MB.\n",
		int(rounds), seconds, runtime.GOMAXPROCS(0), statusMB("VmHWM"))
	if os.Getenv("DECUWATCH_BENCH_PEAK_TFLOPS") != "" {
		flops := 2e9 * benchNumber(b, "DECUWATCH_BENCH_GMAC", 0) * median(walls(ceilings["rows/s"].rates))
		peak := 1e12 * benchNumber(b, "DECUWATCH_BENCH_PEAK_TFLOPS", 0)
		fmt.Printf("The ceiling is %.1f%% of the chip's matrix rate.\n", 100*flops/peak)
	}
	if os.Getenv("DECUWATCH_BENCH_SETTINGS") == "" && benchDevice == "cpu" {
		paideTable()
		memoryTable(b)
	}
}

// benchNumber returns a positive number of the environment.
func benchNumber(b *testing.B, name string, or float64) float64 {
	text := os.Getenv(name)
	if text == "" {
		return or
	}
	v, err := strconv.ParseFloat(text, 64)
	if err != nil || v <= 0 {
		b.Fatalf("%s is %q, must be a positive number", name, text)
	}
	return v
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// ratio returns the median over rounds of a's rate by b's.
func ratio(a, b *cell) float64 {
	x, y := compared(a.rates), compared(b.rates)
	ratios := make([]float64, len(x))
	for i := range x {
		ratios[i] = x[i] / y[i]
	}
	return median(ratios)
}

// compared returns the rates for ratios: per CPU second, or by the clock if a GPU does the work.
func compared(rates []rate) []float64 {
	if benchDevice != "cpu" {
		return walls(rates)
	}
	return cpus(rates)
}

// statusMB returns a field of /proc/self/status in MB.
func statusMB(field string) float64 {
	content, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return math.NaN()
	}
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kb, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb / 1024
		}
	}
	return math.NaN()
}

// openRaw opens a graph of an ensemble, without the sampler around it.
func openRaw(b *testing.B, e *ensemble.Ensemble, file ensemble.File, config ort.Config, g ort.Graph) *ort.Session {
	b.Helper()
	library, err := ort.FindLibrary("")
	if err != nil {
		b.Fatal(err)
	}
	if err := ort.Load(library); err != nil {
		b.Fatal(err)
	}
	if g.Content, err = e.ReadFile(file); err != nil {
		b.Fatal(err)
	}
	config.Device, config.HalfWeights = benchDevice, e.Precision == "fp16"
	s, err := ort.NewSession(config, g)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	return s
}

// rawSession is a session of an ensemble's backbone whose buffers hold plausible rows.
func rawSession(b *testing.B, e *ensemble.Ensemble, config ort.Config) *ort.Session {
	b.Helper()
	latent := []int64{int64(e.Latent.Channels), int64(e.Latent.Height), int64(e.Latent.Width)}
	s := openRaw(b, e, e.Files.UNet, config, ort.Graph{
		Inputs: []ort.Port{
			{Name: e.Graph.UNet.Latent, Shape: latent},
			{Name: e.Graph.UNet.Timestep},
			{Name: e.Graph.UNet.Context, Shape: []int64{int64(e.Context.Tokens), int64(e.Context.Dim)}},
		},
		Output:   ort.Port{Name: e.Graph.UNet.Output, Shape: latent},
		Timestep: e.Graph.UNet.Timestep,
	})
	r := rand.New(rand.NewPCG(1, 1))
	for i := range s.Input(0) {
		s.Input(0)[i] = float32(r.NormFloat64())
	}
	for i := range s.Timesteps() {
		s.Timesteps()[i] = int64(1 + 50*(i%20))
		copy(s.Input(2)[i*e.Context.Size():], e.Members().Row(i%e.Components, i%len(e.Classes)))
	}
	return s
}

// runFor returns rows a second of runs of the given size, on every session at once.
func runFor(b *testing.B, d time.Duration, rows int, sessions ...*ort.Session) rate {
	var ran atomic.Int64
	began := time.Now()
	m := startMeter(func() float64 { return float64(ran.Load()) })
	var wg sync.WaitGroup
	for _, s := range sessions {
		wg.Go(func() {
			for time.Since(began) < d {
				if err := s.Run(rows); err != nil {
					b.Error(err)
					return
				}
				ran.Add(int64(rows))
			}
		})
	}
	wg.Wait()
	return m.rate()
}

// rawCells are the ceiling: the backbone alone, with the settings of the sampler.
func rawCells(b *testing.B) []*cell {
	sizes := []int{1, 2, 4, 8, 16, 32, 64}
	if benchDevice != "cpu" {
		sizes = []int{1, 4, 16, 64, 128, 256} // every size costs a search for algorithms
	}
	e := benchManifest(b)
	s := rawSession(b, e, ort.Config{Threads: runtime.GOMAXPROCS(0), Rows: sizes[len(sizes)-1]})
	var cells []*cell
	for _, rows := range sizes {
		cells = append(cells, &cell{
			name: fmt.Sprintf("raw run of %d rows", rows), unit: "rows/s",
			measure: func(d time.Duration) rate { return runFor(b, d, rows, s) },
		})
	}
	return append(cells, rawScoreCells(b, e, s)...)
}

func benchManifest(b *testing.B) *ensemble.Ensemble {
	b.Helper()
	e, err := ensemble.Open(benchEnsemble)
	if err != nil {
		b.Fatal(err)
	}
	return e
}

// rawImageRows is how many images a run of decoder and judge has at most in the engine.
const rawImageRows = 8

// rawScoreCells are the ceiling of scores a second: the runs of backbone, decoder and judge that scores need, all full,
// and nothing else. Without an image risk they are runs of the backbone alone.
func rawScoreCells(b *testing.B, e *ensemble.Ensemble, backbone *ort.Session) []*cell {
	engine, _ := benchEngine(b, benchEnsemble)
	perScore := engine.Rows(scoring.Request{})
	var images []*ort.Session
	if e.Judge != nil && engine.Profile().ImageRisk != (scoring.Measure{}) {
		config := ort.Config{Threads: runtime.GOMAXPROCS(0), Rows: rawImageRows}
		latent := []int64{int64(e.Latent.Channels), int64(e.Latent.Height), int64(e.Latent.Width)}
		image := []int64{int64(e.Image.Channels), int64(e.Image.Height), int64(e.Image.Width)}
		seen := []int64{int64(e.Judge.Channels), int64(e.Judge.Height), int64(e.Judge.Width)}
		images = []*ort.Session{
			openRaw(b, e, e.Files.Decoder, config, ort.Graph{
				Inputs: []ort.Port{{Name: e.Graph.Decoder.Latent, Shape: latent}},
				Output: ort.Port{Name: e.Graph.Decoder.Output, Shape: image},
			}),
			openRaw(b, e, *e.Files.Judge, config, ort.Graph{
				Inputs: []ort.Port{{Name: e.Judge.Input, Shape: seen}},
				Output: ort.Port{Name: e.Judge.Output, Shape: []int64{int64(len(e.Judge.Outputs))}},
			}),
		}
	}
	var cells []*cell
	if images != nil {
		for _, rows := range []int{1, rawImageRows} {
			cells = append(cells, &cell{
				name: fmt.Sprintf("raw run of decoder and judge, %d images", rows), unit: "images/s",
				measure: func(d time.Duration) rate {
					return repeat(b, d, float64(rows), func() error { return runAll(rows, images...) })
				},
			})
		}
	}
	return append(cells, &cell{name: fmt.Sprintf("raw runs of scores, %d rows a score", perScore), unit: "scores/s",
		measure: func(d time.Duration) rate {
			return repeat(b, d, 64, func() error { // 64 scores: runs of 64 rows, and of 8 images
				for range perScore {
					if err := backbone.Run(64); err != nil {
						return err
					}
				}
				for range 64 / rawImageRows {
					if err := runAll(rawImageRows, images...); err != nil {
						return err
					}
				}
				return nil
			})
		},
	})
}

// runAll runs each session once.
func runAll(rows int, sessions ...*ort.Session) error {
	for _, s := range sessions {
		if err := s.Run(rows); err != nil {
			return err
		}
	}
	return nil
}

// repeat returns the rate of work whose rounds do so much each.
func repeat(b *testing.B, d time.Duration, work float64, round func() error) rate {
	b.Helper()
	done, began := 0.0, time.Now()
	m := startMeter(func() float64 { return done })
	for time.Since(began) < d {
		if err := round(); err != nil {
			b.Fatal(err)
		}
		done += work
	}
	return m.rate()
}

// settingCells compare settings of ONNX Runtime on runs of 2, 16 and 64 rows.
func settingCells(b *testing.B) []*cell {
	n := runtime.GOMAXPROCS(0)
	var cells []*cell
	for _, c := range []struct {
		name     string
		config   ort.Config
		sessions int
	}{
		{"default: one session, all threads, no spinning, all optimisations, arena", ort.Config{Threads: n}, 1},
		{"a session of one thread for each CPU", ort.Config{Threads: 1}, n},
		{"one session of one thread", ort.Config{Threads: 1}, 1},
		{"spinning", ort.Config{Threads: n, Spinning: true}, 1},
	} {
		c.config.Rows = 64
		var sessions []*ort.Session
		for range c.sessions {
			sessions = append(sessions, rawSession(b, benchManifest(b), c.config))
		}
		for _, rows := range []int{2, 16, 64} {
			cells = append(cells, &cell{
				name: fmt.Sprintf("%s, %d rows", c.name, rows), unit: "rows/s",
				measure: func(d time.Duration) rate { return runFor(b, d, rows, sessions...) },
			})
		}
	}
	return cells
}

// counted reads a counter of a registry, all its series together. Rows of padding don't count.
func counted(b *testing.B, reg *prometheus.Registry, name string) float64 {
	families, err := reg.Gather()
	if err != nil {
		b.Fatal(err)
	}
	i := slices.IndexFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == name })
	if i < 0 {
		b.Fatalf("no metric %s", name)
	}
	sum := 0.0
	for _, m := range families[i].GetMetric() {
		if slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetValue() == "padding" }) {
			continue
		}
		sum += m.GetCounter().GetValue()
	}
	return sum
}

const sampledRows = "decuwatch_sampler_rows_total"

func benchEngine(b *testing.B, path string) (*scoring.Engine, *prometheus.Registry) {
	b.Helper()
	reg := prometheus.NewRegistry()
	sessions := int(benchNumber(b, "DECUWATCH_BENCH_SESSIONS", 1))
	e, err := scoring.Open(path, scoring.Options{Device: benchDevice, Sessions: sessions, Registerer: reg})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = e.Close() })
	return e, reg
}

// load keeps a number of requests in flight until the context ends.
func load(ctx context.Context, b *testing.B, e *scoring.Engine, concurrent int, profile scoring.Profile,
) *sync.WaitGroup {
	var wg sync.WaitGroup
	var next atomic.Int64
	for range concurrent {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1))
				r := scoring.Request{
					Key: strconv.Itoa(i), Class: i % len(e.Ensemble().Classes), Seed: uint64(i), Profile: profile,
				}
				if _, err := e.Score(ctx, r); err != nil && !errors.Is(err, context.Canceled) {
					b.Error(err)
					return
				}
			}
		})
	}
	return &wg
}

// samplerCells measure the engine in steady state: scores a second, rows a second, and rows of whole verdicts.
func samplerCells(b *testing.B) []*cell {
	e, reg := benchEngine(b, benchEnsemble)
	rows := func() float64 { return counted(b, reg, sampledRows) }
	steady := func(concurrent int, profile scoring.Profile) func(time.Duration) rate {
		return func(d time.Duration) rate {
			ctx, cancel := context.WithCancel(b.Context())
			wg := load(ctx, b, e, concurrent, profile)
			defer wg.Wait()
			defer cancel()
			time.Sleep(d / 4) // until requests are spread over their steps
			m := startMeter(rows)
			time.Sleep(d)
			return m.rate()
		}
	}
	perScore := e.Rows(scoring.Request{})
	cells := []*cell{
		{
			name: fmt.Sprintf("sampler, 64 in flight, %d rows a score", perScore), unit: "scores/s",
			measure: func(d time.Duration) rate {
				r := steady(64, scoring.Profile{})(d)
				return rate{r.wall / float64(perScore), r.cpu / float64(perScore)}
			},
		},
		monitorCell(b, e, rows),
	}
	for _, concurrent := range []int{1, 4, 16, 64} {
		cells = append(cells, &cell{
			name: fmt.Sprintf("sampler, %d requests in flight", concurrent), unit: "rows/s",
			measure: steady(concurrent, scoring.Profile{}),
		})
	}
	// A row costs the same under every profile.
	p := e.Profile()
	steps := p.RequestRisk.Steps
	one := func(branch, rollout int) scoring.Profile {
		q := p
		q.RequestRisk.BranchStep, q.RequestRisk.RolloutSteps = branch, rollout
		q.RequestRisk.Guidance = ensemble.GuidanceOwn // a branch in the middle has no shared guidance
		q.ClassGap = q.RequestRisk
		return q
	}
	for _, c := range []struct {
		name    string
		profile scoring.Profile
	}{
		{"first step", one(0, 1)}, {"branch in the middle", one(steps/2, 1)},
		{"roll-out from the middle", one(steps/2, steps-steps/2)},
	} {
		name := fmt.Sprintf("sampler, 64 in flight, %s (%d rows)", c.name, e.Rows(scoring.Request{Profile: c.profile}))
		cells = append(cells, &cell{name: name, unit: "rows/s", measure: steady(64, c.profile)})
	}
	return cells
}

// noScorer gives every request the same score at once.
type noScorer struct{ result scoring.Result }

func (n noScorer) Score(context.Context, scoring.Request) (scoring.Result, error) {
	return n.result, nil
}
func (n noScorer) Validate(scoring.Request) error { return nil }

func (n noScorer) Rows(scoring.Request) int { return 1 }

// pipelineCells measure an event from the stream to the acknowledgement: decode, score, decide, commit to a
// PostgreSQL that flushes to disk, double ack. Which names the ensemble in the rows.
func pipelineCells(b *testing.B, path, which string) []*cell {
	e, reg := benchEngine(b, path)
	one, err := e.Score(b.Context(), scoring.Request{Key: "one"})
	if err != nil {
		b.Fatal(err)
	}
	server, err := local.Start(b.Context(), local.Options{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = server.Stop() })
	if err := postgres.Migrate(b.Context(), server.URL()); err != nil {
		b.Fatal(err)
	}
	store, err := postgres.Open(b.Context(), postgres.Config{URL: server.URL()})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(store.Close)
	if err := store.EnsurePartitions(b.Context(), 2); err != nil {
		b.Fatal(err)
	}
	thresholds, err := alerts.NewThresholds(b.Context(), store, nil, nil)
	if err != nil {
		b.Fatal(err)
	}
	name := e.Ensemble().Name
	pipeline := func(scorer monitor.Scorer, inFlight int, events func(d time.Duration) int, progress func() float64,
	) func(d time.Duration) rate {
		js := natstest.Start(b).JetStream()
		cfg := consumers.Config{Models: []string{name}, MaxInFlight: inFlight}
		if _, err := consumers.EnsureStream(b.Context(), js, cfg.Stream); err != nil {
			b.Fatal(err)
		}
		models := map[string]monitor.Model{name: {Scorer: scorer, Classes: e.Ensemble().Labels(), Profile: e.Profile()}}
		m, err := monitor.New(models, thresholds, app.Recorder{Store: store}, monitor.Config{})
		if err != nil {
			b.Fatal(err)
		}
		published := 0
		return func(d time.Duration) rate {
			for range events(d) {
				published++
				header, payload, err := schema.Encode(schema.Event{
					Source: "urn:bench", ID: fmt.Sprintf("%p-%d", js, published), Time: time.Now().UTC(),
					Data: schema.Generation{
						Model: name, Class: schema.ClassIndex(published % len(e.Ensemble().Classes)),
						Seed: uint64(published),
					},
				})
				if err != nil {
					b.Fatal(err)
				}
				msg := &nats.Msg{Subject: schema.SubjectGeneration(name), Header: header, Data: payload}
				if _, err := js.PublishMsgAsync(msg, jetstream.WithStallWait(time.Minute)); err != nil {
					b.Fatal(err)
				}
			}
			<-js.PublishAsyncComplete()
			ctx, cancel := context.WithCancel(b.Context())
			ended := make(chan error)
			runner, err := consumers.New(js, m, cfg)
			if err != nil {
				b.Fatal(err)
			}
			go func() { ended <- runner.Run(ctx) }()
			time.Sleep(d / 4)
			meter := startMeter(progress)
			time.Sleep(d)
			r := meter.rate()
			cancel()
			if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
				b.Error(err)
			}
			return r
		}
	}
	verdicts := func() float64 {
		var n float64
		if err := benchQuery(b, server.URL(), "SELECT count(*) FROM decuwatch.scores", &n); err != nil {
			b.Fatal(err)
		}
		return n
	}
	rows := func() float64 { return counted(b, reg, sampledRows) }
	perScore := e.Rows(scoring.Request{})
	enough := func(d time.Duration) int { return 64 + int(20_000*d.Seconds())/perScore }
	return []*cell{
		{name: "whole pipeline" + which, unit: "rows/s", measure: pipeline(e, 64, enough, rows)},
		{
			name: fmt.Sprintf("whole pipeline%s, %d rows a score", which, perScore), unit: "scores/s",
			measure: pipeline(e, 64, enough, func() float64 { return rows() / float64(perScore) }),
		},
		{
			name: "whole pipeline" + which + ", scorer that does nothing", unit: "events/s",
			measure: pipeline(noScorer{one}, 256,
				func(d time.Duration) int { return int(12_000 * d.Seconds()) }, verdicts),
		},
	}
}

// reference is a decuwatch-train bench that waits for what to time.
type reference struct {
	in  io.Writer
	out *bufio.Reader
}

// startReference starts decuwatch-train bench; nil if no Python with PyTorch is named.
func startReference(b *testing.B, args ...string) *reference {
	python := os.Getenv("DECUWATCH_BENCH_PYTHON")
	if python == "" {
		fmt.Fprintln(os.Stderr, "without PyTorch: DECUWATCH_BENCH_PYTHON names no Python")
		return nil
	}
	training, err := filepath.Abs("../../training")
	if err != nil {
		b.Fatal(err)
	}
	command := exec.Command(python, append([]string{"-m", "decuwatch_training", "bench", benchEnsemble}, args...)...)
	command.Args = append(command.Args, strings.Fields(os.Getenv("DECUWATCH_BENCH_TORCH_ARGS"))...)
	command.Env = append(os.Environ(), "PYTHONPATH="+training+":"+os.Getenv("PYTHONPATH"))
	command.Stderr = os.Stderr
	in, err := command.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := command.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := command.Start(); err != nil {
		b.Fatal(err)
	}
	lines := bufio.NewReader(out)
	b.Cleanup(func() {
		_ = in.Close()
		_, _ = io.Copy(io.Discard, lines)
		_ = command.Wait()
	})
	greeting, err := lines.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	fmt.Fprint(os.Stderr, greeting)
	return &reference{in, lines}
}

// ask returns the answer to a line.
func (r *reference) ask(b *testing.B, question string) (answer rate) {
	fmt.Fprintln(r.in, question)
	line, err := r.out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	if _, err := fmt.Sscan(line, &answer.wall, &answer.cpu); err != nil {
		b.Fatalf("%q: %v", line, err)
	}
	return answer
}

// rawReferenceCells measure runs of the network in PyTorch, as rawCells do in ONNX Runtime.
func rawReferenceCells(b *testing.B) []*cell {
	r := startReference(b, "--raw")
	if r == nil {
		return nil
	}
	modes := []struct {
		name, mode string
		rows       int
	}{{"eager", "eager", 1}, {"eager", "eager", 64}}
	if benchDevice != "cpu" {
		modes = append(modes, []struct {
			name, mode string
			rows       int
		}{
			{"eager in a CUDA graph", "graphs", 1}, {"eager in a CUDA graph", "graphs", 64}, {"eager", "eager", 256},
			{"torch.compile", "compile", 64},
		}...)
	}
	var cells []*cell
	for _, m := range modes {
		cells = append(cells, &cell{
			name: fmt.Sprintf("PyTorch, %s, run of %d rows", m.name, m.rows), unit: "rows/s",
			measure: func(d time.Duration) rate {
				return r.ask(b, fmt.Sprint(d.Seconds(), " ", m.mode, " ", m.rows))
			},
		})
	}
	return cells
}

// referenceCells measure the authors' code in PyTorch, if a Python with PyTorch is named.
func referenceCells(b *testing.B) []*cell {
	var cells []*cell
	threads := int(benchNumber(b, "DECUWATCH_BENCH_TORCH_THREADS", float64(runtime.GOMAXPROCS(0))))
	for _, seeds := range []int{1, 8} {
		r := startReference(b, "--seeds", strconv.Itoa(seeds), "--threads", strconv.Itoa(threads))
		if r == nil {
			return nil
		}
		cells = append(cells, &cell{
			name:    fmt.Sprintf("the authors' way in PyTorch, %d thread(s), %d seed(s) a batch", threads, seeds),
			unit:    "scores/s",
			measure: func(d time.Duration) rate { return r.ask(b, fmt.Sprint(d.Seconds())) },
		})
	}
	return cells
}

// paideTable prints nanoseconds of an estimate from its means.
func paideTable() {
	fmt.Printf("\n| PaiDE of M components | dimensions | µs |\n|---|---|---|\n")
	r := rand.New(rand.NewPCG(2, 2))
	for _, size := range []struct{ m, n int }{{3, 256}, {5, 256}, {10, 256}, {5, 3 * 64 * 64}, {5, 4 * 64 * 64}} {
		means := make([][]float32, size.m)
		for i := range means {
			means[i] = make([]float32, size.n)
			for j := range means[i] {
				means[i][j] = float32(0.01 * r.NormFloat64())
			}
		}
		const times = 2000
		spent := cpuTime()
		for range times {
			paide.Estimate(paide.SquaredW2(means))
		}
		fmt.Printf("| %d | %d | %.1f |\n", size.m, size.n, float64((cpuTime()-spent).Microseconds())/times)
	}
}

// memoryTable prints what a score allocates, and the resident memory over 10,000 requests of a tiny ensemble.
func memoryTable(b *testing.B) {
	e, _ := benchEngine(b, benchEnsemble)
	score := func(e *scoring.Engine, n, concurrent int) {
		var wg sync.WaitGroup
		var next atomic.Int64
		for range concurrent {
			wg.Go(func() {
				for {
					i := int(next.Add(1))
					if i > n {
						return
					}
					r := scoring.Request{Key: strconv.Itoa(i), Class: i % len(e.Ensemble().Classes), Seed: uint64(i)}
					if _, err := e.Score(b.Context(), r); err != nil {
						b.Error(err)
					}
				}
			})
		}
		wg.Wait()
	}
	score(e, 64, 16)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	score(e, 128, 16)
	runtime.ReadMemStats(&after)
	fmt.Printf("\nA score allocates %.1f kB in %.0f pieces.\n",
		float64(after.TotalAlloc-before.TotalAlloc)/128/1024, float64(after.Mallocs-before.Mallocs)/128)
	small, _ := benchEngine(b, "../../scoring/testdata/tiny")
	fmt.Printf("\n| requests of the tiny ensemble, 64 in flight | resident MB |\n|---|---|\n")
	done := 0
	for _, n := range []int{1000, 2500, 5000, 10_000} {
		score(small, n-done, 64)
		done = n
		fmt.Printf("| %d | %.0f |\n", n, statusMB("VmRSS"))
	}
}

func benchQuery(b *testing.B, url, query string, into ...any) error {
	b.Helper()
	conn, err := pgx.Connect(b.Context(), url)
	if err != nil {
		return err
	}
	defer conn.Close(b.Context())
	return conn.QueryRow(b.Context(), query).Scan(into...)
}

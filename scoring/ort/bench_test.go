package ort

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkSettings measures what each setting of the runtime gains on the backbone of the demo, or on the ensemble and
// the device that DECUWATCH_BENCH_ENSEMBLE and DECUWATCH_BENCH_DEVICE name. DECUWATCH_BENCH_ONLY chooses settings.
func BenchmarkSettings(b *testing.B) {
	load(b)
	graph, half := benchGraph(b)
	device := cmp.Or(os.Getenv("DECUWATCH_BENCH_DEVICE"), "cpu")
	settings := []struct {
		name    string
		without ablation
	}{
		{"default", ablation{}}, {"no arena", ablation{arena: true}}, {"no memory pattern", ablation{pattern: true}},
		{"basic optimizations", ablation{optimization: true}},
	}
	rows := []int{2, 16, 64}
	if device != "cpu" {
		settings = append(settings[:1], []struct {
			name    string
			without ablation
		}{{"channels first", ablation{nhwc: true}}}...)
		rows = []int{1, 64, 256}
	}
	only, err := regexp.Compile(os.Getenv("DECUWATCH_BENCH_ONLY"))
	if err != nil {
		b.Fatalf("DECUWATCH_BENCH_ONLY: %v", err)
	}
	for _, c := range settings {
		if !only.MatchString(c.name) {
			continue
		}
		began := time.Now()
		s, err := NewSession(Config{Device: device, Threads: runtime.GOMAXPROCS(0), Rows: rows[len(rows)-1],
			HalfWeights: half, without: c.without}, graph)
		if err != nil {
			b.Error(err)
			continue
		}
		fill(s)
		fmt.Printf("%s: loaded in %.1f s\n", c.name, time.Since(began).Seconds())
		for _, rows := range rows {
			began := time.Now()
			if err := s.Run(rows); err != nil {
				b.Error(err)
				break
			}
			fmt.Printf("%s: first run of %d rows in %.2f s; mean square of the outputs %.6g\n", c.name, rows,
				time.Since(began).Seconds(), meanSquare(s.Output()[:rows*len(s.Output())/s.rows]))
			b.Run(fmt.Sprintf("%s/%d", c.name, rows), func(b *testing.B) {
				began := cpuSeconds(b)
				for b.Loop() {
					if err := s.Run(rows); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(rows*b.N)/b.Elapsed().Seconds(), "rows/s")
				b.ReportMetric(float64(rows*b.N)/(cpuSeconds(b)-began), "rows/cpu-s")
			})
		}
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	}
}

// fill writes plausible rows: zeros would be faster.
func fill(s *Session) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, i := range []int{0, 2} {
		for j := range s.Input(i) {
			s.Input(i)[j] = float32(r.NormFloat64())
		}
	}
	for i := range s.Timesteps() {
		s.Timesteps()[i] = int64(1 + 50*(i%20))
	}
}

// meanSquare lets a reader see whether settings compute the same.
func meanSquare(values []float32) float64 {
	sum := 0.0
	for _, v := range values {
		sum += float64(v) * float64(v)
	}
	return sum / float64(len(values))
}

// benchGraph is the U-Net of the ensemble that is measured, and whether its weights are fp16.
func benchGraph(b *testing.B) (_ Graph, half bool) {
	b.Helper()
	dir := cmp.Or(os.Getenv("DECUWATCH_BENCH_ENSEMBLE"), "../../ensembles/fashion-mnist")
	document, err := os.ReadFile(filepath.Join(dir, "ensemble.json"))
	if err != nil {
		b.Fatal(err)
	}
	var m struct {
		Precision string
		Files     struct{ UNet struct{ Path string } }
		Latent    struct{ Channels, Height, Width int64 }
		Context   struct{ Tokens, Dim int64 }
		Graph     struct {
			UNet struct{ Latent, Timestep, Context, Output string }
		}
	}
	if err := json.Unmarshal(document, &m); err != nil {
		b.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(dir, m.Files.UNet.Path))
	if err != nil {
		b.Fatal(err)
	}
	latent, names := []int64{m.Latent.Channels, m.Latent.Height, m.Latent.Width}, m.Graph.UNet
	return Graph{
		Content: content,
		Dir:     dir,
		Inputs: []Port{
			{names.Latent, latent}, {Name: names.Timestep}, {names.Context, []int64{m.Context.Tokens, m.Context.Dim}},
		},
		Output:   Port{names.Output, latent},
		Timestep: names.Timestep,
	}, m.Precision == "fp16"
}

// cpuSeconds returns the CPU time of the process.
func cpuSeconds(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

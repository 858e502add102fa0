package ort

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkSettings measures what each setting of the runtime gains on the backbone of the demo.
func BenchmarkSettings(b *testing.B) {
	load(b)
	content, err := os.ReadFile("../../ensembles/fashion-mnist/unet.onnx")
	if err != nil {
		b.Fatal(err)
	}
	latent := []int64{4, 8, 8}
	for _, c := range []struct {
		name    string
		without ablation
	}{
		{"default", ablation{}}, {"no arena", ablation{arena: true}}, {"no memory pattern", ablation{pattern: true}},
		{"basic optimizations", ablation{optimization: true}},
	} {
		s, err := NewSession(Config{Device: "cpu", Threads: runtime.GOMAXPROCS(0), Rows: 64, without: c.without}, Graph{
			Content:  content,
			Inputs:   []Port{{"latent", latent}, {Name: "timestep"}, {"context", []int64{1, 64}}},
			Output:   Port{"prediction", latent},
			Timestep: "timestep",
		})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = s.Close() })
		for _, rows := range []int{2, 16, 64} {
			b.Run(fmt.Sprintf("%s/%d", c.name, rows), func(b *testing.B) {
				began := cpuSeconds(b)
				for b.Loop() {
					if err := s.Run(rows); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(rows*b.N)/(cpuSeconds(b)-began), "rows/cpu-s")
			})
		}
	}
}

// cpuSeconds returns the CPU time of the process.
func cpuSeconds(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

package ort

import (
	"cmp"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// device runs the graphs of the tests: cpu, or what DECUWATCH_TEST_DEVICE names.
var device = cmp.Or(os.Getenv("DECUWATCH_TEST_DEVICE"), "cpu")

func load(t testing.TB) {
	t.Helper()
	path, err := FindLibrary("")
	if err != nil {
		t.Fatal(err)
	}
	if err := Load(path); err != nil {
		t.Fatal(err)
	}
}

// tinyGraph is the U-Net of scoring/testdata/tiny.
func tinyGraph(t testing.TB) Graph {
	t.Helper()
	content, err := os.ReadFile("../testdata/tiny/unet.onnx")
	if err != nil {
		t.Fatal(err)
	}
	return Graph{
		Content: content,
		Inputs: []Port{
			{Name: "latent", Shape: []int64{2, 4, 4}},
			{Name: "timestep"},
			{Name: "context", Shape: []int64{1, 8}},
		},
		Output:   Port{Name: "prediction", Shape: []int64{2, 4, 4}},
		Timestep: "timestep",
	}
}

func newSession(t testing.TB, config Config) *Session {
	t.Helper()
	load(t)
	s, err := NewSession(config, tinyGraph(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Every row has its own timestep and context, whatever rows share its run.
func TestRowsAreIndependent(t *testing.T) {
	s := newSession(t, Config{Device: device, Threads: 1, Rows: 9})
	const n, c = 2 * 4 * 4, 8
	fill := func(row, kind int) {
		for i := range n {
			s.Input(0)[row*n+i] = float32(math.Sin(float64(kind*n + i)))
		}
		for i := range c {
			s.Input(2)[row*c+i] = float32(math.Cos(float64(kind*c + i)))
		}
		s.Timesteps()[row] = int64(100*kind + 1)
	}
	alone := make([][]float32, 9)
	for kind := range 9 {
		fill(0, kind)
		if err := s.Run(1); err != nil {
			t.Fatal(err)
		}
		alone[kind] = append(alone[kind], s.Output()[:n]...)
		if kind > 0 && math.Abs(float64(alone[kind][0]-alone[kind-1][0])) < 1e-6 {
			t.Errorf("rows %d and %d have the same output", kind-1, kind)
		}
	}
	for kind := range 9 {
		fill(8-kind, kind)
	}
	if err := s.Run(9); err != nil {
		t.Fatal(err)
	}
	for kind := range 9 {
		for i, want := range alone[kind] {
			if have := s.Output()[(8-kind)*n+i]; math.Abs(float64(have-want)) > 1e-5 {
				t.Fatalf("row of kind %d, element %d: %v among others, %v alone", kind, i, have, want)
			}
		}
	}
}

func TestSettings(t *testing.T) {
	for name, config := range map[string]Config{
		"spinning": {Spinning: true}, "two threads": {Threads: 2}, "no arena": {without: ablation{arena: true}},
		"no pattern": {without: ablation{pattern: true}}, "basic": {without: ablation{optimization: true}},
	} {
		config.Device, config.Rows = device, 2
		s := newSession(t, config)
		if err := s.Run(2); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A device whose memory limit the graph does not fit is refused; the process and its other sessions go on.
func TestMemoryLimit(t *testing.T) {
	other := newSession(t, Config{Device: device, Rows: 2})
	load(t)
	s, err := NewSession(Config{Device: device, Rows: 64, MemoryLimit: 4096}, tinyGraph(t))
	if err == nil {
		err = s.Run(64)
		if closing := s.Close(); closing != nil {
			t.Error(closing)
		}
	}
	t.Logf("4 KiB of memory: %v", err)
	if (device == "cpu") != (err == nil) { // the limit is of GPU memory
		t.Errorf("a limit of 4 KiB on %s: error %v", device, err)
	}
	if err := other.Run(2); err != nil {
		t.Errorf("another session: %v", err)
	}
	if err := newSession(t, Config{Device: device, Rows: 64, MemoryLimit: 1 << 30}).Run(64); err != nil {
		t.Errorf("a limit of 1 GiB: %v", err)
	}
}

func TestTerminate(t *testing.T) {
	s := newSession(t, Config{Device: device, Threads: 1, Rows: 512})
	if err := s.Terminate(); err != nil {
		t.Error(err)
	}
	if err := s.Run(512); err != nil {
		t.Errorf("a run after an idle Terminate: %v", err)
	}
	// A run that is terminated from beside it ends with ErrTerminated or, where that came too late, well; the next one
	// is untouched.
	terminated := 0
	for range 200 {
		ended := make(chan error)
		go func() { ended <- s.Run(512) }()
		var err error
		for done := false; !done; {
			select {
			case err = <-ended:
				done = true
			default:
				if err := s.Terminate(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err != nil && !errors.Is(err, ErrTerminated) {
			t.Fatal(err)
		}
		if err != nil {
			terminated++
		}
		if err := s.Run(1); err != nil {
			t.Fatalf("the run after: %v", err)
		}
		if terminated > 3 {
			return
		}
	}
	t.Errorf("%d of 200 runs were cut short", terminated)
}

// The binding makes six small allocations a run: two slices of pointers and four pointers. Ours makes none.
func TestRunAllocates(t *testing.T) {
	s := newSession(t, Config{Device: device, Threads: 1, Rows: 64})
	for _, rows := range []int{1, 64} {
		allocations := testing.AllocsPerRun(20, func() {
			if err := s.Run(rows); err != nil {
				t.Fatal(err)
			}
		})
		if allocations > 6 {
			t.Errorf("a run of %d rows allocates %v times", rows, allocations)
		}
	}
}

func TestGraphErrors(t *testing.T) {
	load(t)
	for name, change := range map[string]func(*Graph){
		"not a graph":    func(g *Graph) { g.Content = []byte("no graph") },
		"cut short":      func(g *Graph) { g.Content = g.Content[:len(g.Content)/2] },
		"empty":          func(g *Graph) { g.Content = nil },
		"unknown output": func(g *Graph) { g.Output.Name = "nothing" },
		"wrong shape":    func(g *Graph) { g.Output.Shape = []int64{2, 4, 5} },
		"wrong input":    func(g *Graph) { g.Inputs[2].Shape = []int64{1, 9} },
	} {
		g := tinyGraph(t)
		change(&g)
		s, err := NewSession(Config{Device: device, Rows: 2}, g)
		if err == nil {
			err = s.Run(2)
			if closing := s.Close(); closing != nil {
				t.Error(closing)
			}
		}
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestParseDevice(t *testing.T) {
	for device, want := range map[string]struct {
		provider string
		number   int
	}{"cpu": {"cpu", 0}, "cuda": {"cuda", 0}, "cuda:1": {"cuda", 1}, "tensorrt:3": {"tensorrt", 3}} {
		provider, number, err := ParseDevice(device)
		if err != nil || provider != want.provider || number != want.number {
			t.Errorf("%s: %s %d %v", device, provider, number, err)
		}
	}
	for _, device := range []string{"", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "tensorrt:0:1"} {
		if _, _, err := ParseDevice(device); err == nil {
			t.Errorf("%q was accepted", device)
		}
	}
}

func TestProfileShapes(t *testing.T) {
	if have, want := profileShapes(tinyGraph(t), 8), "latent:8x2x4x4,timestep:8,context:8x1x8"; have != want {
		t.Errorf("%q, want %q", have, want)
	}
}

func TestFindLibrary(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lib.so")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if have, err := FindLibrary(file); err != nil || have != file {
		t.Errorf("explicit: %s, %v", have, err)
	}
	t.Setenv("DECUWATCH_ONNXRUNTIME_LIB", file)
	if have, err := FindLibrary(""); err != nil || have != file {
		t.Errorf("environment: %s, %v", have, err)
	}
	for _, missing := range []string{"/no/such/file", t.TempDir()} {
		if _, err := FindLibrary(missing); err == nil || !strings.Contains(err.Error(), missing) {
			t.Errorf("%s: %v", missing, err)
		}
	}
}

// The library is loaded once; another path is refused, and so is a file that is no library.
func TestLoad(t *testing.T) {
	load(t)
	load(t)
	if err := Load("/no/such/file"); err == nil {
		t.Error("another library was loaded")
	}
	if !strings.HasPrefix(Runtime(), "onnxruntime ") {
		t.Errorf("runtime is %q", Runtime())
	}
}

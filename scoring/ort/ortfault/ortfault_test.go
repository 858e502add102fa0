package ortfault

import (
	"errors"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/ort"
)

// The shim has one mode after another, in this process, and the real library works behind it.
func TestModes(t *testing.T) {
	s := New(t)
	for _, pair := range s.Env() {
		name, value, _ := strings.Cut(pair, "=")
		t.Setenv(name, value)
		// C reads the environment that Setenv sets through cgo.
	}
	if os.Getenv("ORTFAULT_FILE") == "" {
		t.Fatal("Env names no file")
	}
	if err := ort.Load(s.library); err != nil {
		t.Fatal(err)
	}
	e, err := ensemble.Open("../../testdata/tiny")
	if err != nil {
		t.Fatal(err)
	}
	content, err := e.ReadFile(e.Files.Decoder)
	if err != nil {
		t.Fatal(err)
	}
	session, err := ort.NewSession(ort.Config{Device: "cpu", Rows: 1}, ort.Graph{
		Content: content,
		Inputs: []ort.Port{{Name: e.Graph.Decoder.Latent, Shape: []int64{int64(e.Latent.Channels), int64(e.Latent.Height),
			int64(e.Latent.Width)}}},
		Output: ort.Port{Name: e.Graph.Decoder.Output, Shape: []int64{int64(e.Image.Channels), int64(e.Image.Height),
			int64(e.Image.Width)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	finite := func() bool { return !math.IsNaN(float64(session.Output()[0])) }
	if err := session.Run(1); err != nil || !finite() {
		t.Errorf("ok: %v, finite %v", err, finite())
	}
	s.SetNext(Error, 1)
	if err := session.Run(1); err == nil || !strings.Contains(err.Error(), "ortfault") {
		t.Errorf("error: %v", err)
	}
	if err := session.Run(1); err != nil {
		t.Errorf("the run after one error: %v", err)
	}
	s.Set(NaN)
	if err := session.Run(1); err != nil || finite() {
		t.Errorf("nan: %v, finite %v", err, finite())
	}
	s.Set(Hang)
	ended := make(chan error, 1)
	go func() { ended <- session.Run(1) }()
	select {
	case err := <-ended:
		t.Fatalf("a hung run ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := session.Terminate(); err != nil {
		t.Error(err)
	}
	s.Set(OK)
	select {
	case err := <-ended: // terminated, or well when that came too late
		if err != nil && !errors.Is(err, ort.ErrTerminated) {
			t.Errorf("after the hang: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the run still hangs")
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
}

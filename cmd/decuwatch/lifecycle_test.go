package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestPartsStopInTheOppositeOrderOfTheirStart(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	life := newLifecycle(ctx, slog.New(slog.DiscardHandler))
	var stopped []string
	life.undo("first", func() error { stopped = append(stopped, "first"); return errors.New("broke") })
	life.run("second", func(ctx context.Context) error {
		<-ctx.Done()
		stopped = append(stopped, "second")
		return ctx.Err()
	})
	life.undo("third", func() error { stopped = append(stopped, "third"); return nil })
	cancel()
	if err := life.wait(); err != nil {
		t.Errorf("wait: %v", err)
	}
	if err := life.end(); err == nil || err.Error() != "stop first: broke" {
		t.Errorf("end: %v", err)
	}
	if !slices.Equal(stopped, []string{"third", "second", "first"}) {
		t.Errorf("stopped %q", stopped)
	}
}

func TestAPartThatEndsByItselfEndsTheProgram(t *testing.T) {
	for want, part := range map[string]func(context.Context) error{
		"relay ended: away":          func(context.Context) error { return errors.New("away") },
		"relay ended: for no reason": func(context.Context) error { return nil },
	} {
		life := newLifecycle(t.Context(), slog.New(slog.DiscardHandler))
		life.run("relay", part)
		if err := life.wait(); err == nil || err.Error() != want {
			t.Errorf("wait: %v, want %s", err, want)
		}
		_ = life.end() // its error is the part's
	}
}

func TestReadyOnlyWhereEveryPartIs(t *testing.T) {
	reg := prometheus.NewRegistry()
	h := newHealth(reg)
	mux := httptest.NewServer(observability(reg, h, false))
	defer mux.Close()
	page := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get(mux.URL + path) //nolint:noctx // the server is this process
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	if status, body := page("/readyz"); status != http.StatusServiceUnavailable || body != "ensemble: not started\nnats: not started\npostgres: not started\nstream: not started\n" {
		t.Errorf("before the start: %d %q", status, body)
	}
	if status, _ := page("/healthz"); status != http.StatusOK {
		t.Errorf("alive: %d", status)
	}
	up := func(context.Context) error { return nil }
	for _, part := range []string{partNATS, partPostgres, partEnsemble, partStream} {
		h.set(part, up)
	}
	if status, body := page("/readyz"); status != http.StatusOK || body != "ready\n" {
		t.Errorf("everything is there: %d %q", status, body)
	}
	h.set(partPostgres, func(context.Context) error { return errors.New("connection refused") })
	if status, body := page("/readyz"); status != http.StatusServiceUnavailable || body != "postgres: connection refused\n" {
		t.Errorf("Postgres is away: %d %q", status, body)
	}
	want := "# HELP decuwatch_ready 1 while a part that scoring needs is there: nats, postgres, ensemble, stream.\n# TYPE decuwatch_ready gauge\n" +
		"decuwatch_ready{part=\"ensemble\"} 1\ndecuwatch_ready{part=\"nats\"} 1\ndecuwatch_ready{part=\"postgres\"} 0\ndecuwatch_ready{part=\"stream\"} 1\n"
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "decuwatch_ready"); err != nil {
		t.Error(err)
	}
	if status, _ := page("/debug/pprof/"); status != http.StatusNotFound {
		t.Errorf("profiles are served without being asked for: %d", status)
	}
}

func TestFailpointsAreRead(t *testing.T) {
	if f, err := newFailpoint(""); f != nil || err != nil {
		t.Errorf("none: %v, %v", f, err)
	}
	for _, stage := range failpoints() {
		if f, err := newFailpoint(stage + ":3"); err != nil || f.stage != stage || f.left.Load() != 3 {
			t.Errorf("%s:3: %v, %v", stage, f, err)
		}
	}
	for _, wrong := range []string{"nowhere", "scored:0", "scored:x"} {
		if _, err := newFailpoint(wrong); err == nil {
			t.Errorf("%q is accepted", wrong)
		}
	}
}

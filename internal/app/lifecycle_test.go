package app

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestPartsStopInTheOppositeOrderOfTheirStart(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	life, _ := NewLifecycle(ctx, slog.New(slog.DiscardHandler))
	var stopped []string
	life.OnStop("first", func() error { stopped = append(stopped, "first"); return errors.New("broke") })
	life.Run("second", func(ctx context.Context) error {
		<-ctx.Done()
		stopped = append(stopped, "second")
		return ctx.Err()
	})
	life.OnStop("third", func() error { stopped = append(stopped, "third"); return nil })
	cancel()
	if err := life.Wait(); err != nil {
		t.Errorf("wait: %v", err)
	}
	var err error
	if life.End(&err); err == nil || err.Error() != "stop first: broke" {
		t.Errorf("end: %v", err)
	}
	if !slices.Equal(stopped, []string{"third", "second", "first"}) {
		t.Errorf("stopped %q", stopped)
	}
}

func TestAPartThatEndsByItselfEndsTheProgram(t *testing.T) {
	for want, part := range map[string]func(context.Context) error{
		"relay: away":                func(context.Context) error { return errors.New("away") },
		"relay: exited unexpectedly": func(context.Context) error { return nil },
	} {
		life, _ := NewLifecycle(t.Context(), slog.New(slog.DiscardHandler))
		life.Run("relay", part)
		if err := life.Wait(); err == nil || err.Error() != want {
			t.Errorf("wait: %v, want %s", err, want)
		}
		var err error
		life.End(&err) // its error is the part's
	}
}

// Readiness is the last result of background checks: one at a time for each part, with a deadline and a maximum age.
func TestReadyOnlyIfEveryPartIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		h := newHealth(reg)
		mux := observability(reg, h, false)
		page := func(path string) (int, string) {
			t.Helper()
			w := httptest.NewRecorder()
			mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
			return w.Code, w.Body.String()
		}
		holds := func(when, path string, status int, body string) {
			t.Helper()
			if s, b := page(path); s != status || b != body {
				t.Errorf("%s: %d %q, want %d %q", when, s, b, status, body)
			}
		}
		ctx, stop := context.WithCancel(t.Context())
		go func() { _ = h.run(ctx) }() // returns nil
		settle := func(d time.Duration) { time.Sleep(d); synctest.Wait() }
		settle(time.Minute)
		holds("before the start", "/readyz", http.StatusServiceUnavailable,
			strings.Join(parts, ": not started\n")+": not started\n")
		holds("alive", "/healthz", http.StatusOK, "alive\n")
		var mu sync.Mutex // of what follows
		checks, running, most := 0, 0, 0
		var answer error
		hang := make(chan struct{})
		locked := func(f func()) { mu.Lock(); defer mu.Unlock(); f() }
		close(hang)
		for _, name := range parts {
			h.set(name, func(context.Context) error { return nil })
		}
		h.set(partPostgres, func(context.Context) error {
			var wait chan struct{}
			locked(func() { checks++; running++; most = max(most, running); wait = hang })
			<-wait
			mu.Lock()
			defer mu.Unlock()
			running--
			return answer
		})
		settle(time.Second)
		for range 1000 {
			holds("everything works", "/readyz", http.StatusOK, "ready\n")
		}
		locked(func() {
			if checks != 1 {
				t.Errorf("1000 requests caused %d checks", checks)
			}
			answer = errors.New("disk full")
		})
		settle(checkEvery)
		holds("Postgres is full", "/readyz", http.StatusServiceUnavailable, "postgres: disk full\n")
		want := "# HELP decuwatch_ready 1 while what the next verdict needs works, by part: " +
			"clock, ensemble, nats, postgres, pulling, stream, workers.\n# TYPE decuwatch_ready gauge\n"
		for _, name := range parts {
			up := "1"
			if name == partPostgres {
				up = "0"
			}
			want += "decuwatch_ready{part=\"" + name + "\"} " + up + "\n"
		}
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "decuwatch_ready"); err != nil {
			t.Error(err)
		}
		locked(func() { answer = nil })
		settle(2 * time.Second)
		holds("Postgres works again", "/readyz", http.StatusOK, "ready\n")
		locked(func() { hang = make(chan struct{}) })
		settle(time.Minute)
		locked(func() {
			_, body := page("/readyz")
			if !strings.HasPrefix(body, "postgres: its check has not returned for 5") || running != 1 || most != 1 {
				t.Errorf("Postgres hangs: %q, %d checks at once", body, most)
			}
			close(hang)
		})
		settle(time.Second)
		holds("Postgres no longer hangs", "/readyz", http.StatusOK, "ready\n")
		stop()
		settle(time.Hour)
		if _, body := page("/readyz"); !strings.HasPrefix(body, "clock: was last checked 1h0m") {
			t.Errorf("the checks have stopped: %q", body)
		}
		if status, _ := page("/debug/pprof/"); status != http.StatusNotFound {
			t.Errorf("profiles are served although metrics.pprof is off: %d", status)
		}
	})
}

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"sort"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Parts that readiness asks for.
const (
	partNATS     = "nats"
	partPostgres = "postgres"
	partEnsemble = "ensemble"
	partStream   = "stream" // settings of streams and consumers
)

// health knows whether the parts are there.
type health struct {
	gauge *prometheus.GaugeVec
	mu    sync.Mutex
	parts map[string]func(context.Context) error
}

// probeTimeout bounds the question to one part.
const probeTimeout = 2 * time.Second

func newHealth(reg prometheus.Registerer) *health {
	h := &health{
		gauge: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_ready", Help: "1 while a part that scoring needs is there: nats, postgres, ensemble, stream.",
		}, []string{"part"}),
		parts: map[string]func(context.Context) error{},
	}
	for _, part := range []string{partNATS, partPostgres, partEnsemble, partStream} {
		h.set(part, func(context.Context) error { return fmt.Errorf("not started") })
		h.gauge.WithLabelValues(part)
	}
	reg.MustRegister(h.gauge)
	return h
}

// set says how a part is asked.
func (h *health) set(part string, ask func(context.Context) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.parts[part] = ask
}

// ask asks all parts and returns what is wrong with those that are not there.
func (h *health) ask(ctx context.Context) map[string]error {
	h.mu.Lock()
	parts := make(map[string]func(context.Context) error, len(h.parts))
	for name, ask := range h.parts {
		parts[name] = ask
	}
	h.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	wrong := map[string]error{}
	for name, ask := range parts {
		up := 1.0
		if err := ask(ctx); err != nil {
			wrong[name], up = err, 0
		}
		h.gauge.WithLabelValues(name).Set(up)
	}
	return wrong
}

// run keeps the gauges current.
func (h *health) run(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		h.ask(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// ready answers 200 where every part is there, else 503 and what is wrong.
func (h *health) ready(w http.ResponseWriter, r *http.Request) {
	wrong := h.ask(r.Context())
	if len(wrong) == 0 {
		fmt.Fprintln(w, "ready")
		return
	}
	names := make([]string, 0, len(wrong))
	for name := range wrong {
		names = append(names, name)
	}
	sort.Strings(names)
	w.WriteHeader(http.StatusServiceUnavailable)
	for _, name := range names {
		fmt.Fprintf(w, "%s: %v\n", name, wrong[name])
	}
}

// observability is the mux of metrics, health and profiles.
func observability(reg *prometheus.Registry, h *health, profiles bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.InstrumentMetricHandler(reg, promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true, Registry: reg})))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("GET /readyz", h.ready)
	if profiles {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// serveHTTP serves handler on l until ctx ends; requests under way are given five seconds.
func serveHTTP(ctx context.Context, l net.Listener, handler http.Handler) error {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(stop); err != nil {
		return server.Close()
	}
	return nil
}

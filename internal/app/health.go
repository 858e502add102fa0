package app

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Parts of readiness.
const (
	partNATS     = "nats"     // an alert could be stored
	partPostgres = "postgres" // a verdict could be committed
	partEnsemble = "ensemble" // every session of every backbone runs
	partPulling  = "pulling"  // events are taken from the stream
	partStream   = "stream"   // the settings of streams and consumers lose no event
	partClock    = "clock"    // the worker's, Postgres' and JetStream's clocks agree
	partWorkers  = "workers"  // nobody scores one of the models with another ensemble
)

var parts = []string{partClock, partEnsemble, partNATS, partPostgres, partPulling, partStream, partWorkers}

const (
	checkEvery   = 5 * time.Second             // between two checks of a part that works
	checkAgain   = time.Second                 // between two checks of a part that does not
	checkTimeout = 5 * time.Second             // deadline of a check
	checkMaxAge  = checkEvery + 2*checkTimeout // after which a result does not count any more
)

// health checks the parts in the background and keeps the last results. A request for them starts no check.
type health struct {
	gauge *prometheus.GaugeVec
	mu    sync.Mutex
	parts map[string]*part
}

// part is one part with its last result.
type part struct {
	check   func(context.Context) error
	err     error
	checked time.Time // end of the last check
	began   time.Time // of the check in progress; zero if no check runs
	due     time.Time
}

var errNotStarted = errors.New("not started")

func newHealth(reg prometheus.Registerer) *health {
	h := &health{
		gauge: promauto.With(reg).NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_ready",
			Help: "1 while what the next verdict needs works, by part: " + strings.Join(parts, ", ") + ".",
		}, []string{"part"}),
		parts: map[string]*part{},
	}
	for _, name := range parts {
		h.parts[name] = &part{err: errNotStarted, checked: time.Now()}
		h.gauge.WithLabelValues(name)
	}
	return h
}

// set sets the check of a part. The check must end when its context does.
func (h *health) set(name string, check func(context.Context) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.parts[name].check = check
}

// note sets the result of a part that cannot be checked yet.
func (h *health) note(name string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.parts[name].err = err
}

// run checks the parts until ctx ends, each part once at a time, however long that takes.
func (h *health) run(ctx context.Context) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		h.begin(ctx)
		h.wrong()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// begin starts the checks that are due.
func (h *health) begin(ctx context.Context) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	for _, p := range h.parts {
		if p.check == nil || !p.began.IsZero() || now.Before(p.due) {
			continue
		}
		p.began = now
		go h.checkOne(ctx, p, p.check)
	}
}

func (h *health) checkOne(ctx context.Context, p *part, check func(context.Context) error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	err := check(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	p.err, p.checked, p.began = err, time.Now(), time.Time{}
	p.due = p.checked.Add(checkEvery)
	if err != nil {
		p.due = p.checked.Add(checkAgain)
	}
}

// wrong returns the errors by part, and sets the metric.
func (h *health) wrong() map[string]error {
	h.mu.Lock()
	defer h.mu.Unlock()
	wrong := map[string]error{}
	for name, p := range h.parts {
		up := 1.0
		if err := p.state(time.Now()); err != nil {
			wrong[name], up = err, 0
		}
		h.gauge.WithLabelValues(name).Set(up)
	}
	return wrong
}

// state returns the error of the part at a moment.
func (p *part) state(now time.Time) error {
	switch {
	case !p.began.IsZero() && now.Sub(p.began) > checkTimeout+time.Second:
		return fmt.Errorf("its check has not returned for %s", now.Sub(p.began).Round(time.Second))
	case p.err != nil:
		return p.err
	case now.Sub(p.checked) > checkMaxAge:
		return fmt.Errorf("was last checked %s ago", now.Sub(p.checked).Round(time.Second))
	}
	return nil
}

// ready answers 200 if every part works, else 503 and the errors.
func (h *health) ready(w http.ResponseWriter, _ *http.Request) {
	wrong := h.wrong()
	if len(wrong) == 0 {
		fmt.Fprintln(w, "ready")
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	for _, name := range parts {
		if err := wrong[name]; err != nil {
			fmt.Fprintf(w, "%s: %v\n", name, err)
		}
	}
}

// observability is the mux of metrics, health and profiles.
func observability(reg *prometheus.Registry, h *health, profiles bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.InstrumentMetricHandler(reg,
		promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true, Registry: reg})))
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

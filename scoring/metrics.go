package scoring

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// padding is the kind of rows that only fill a bucket; the other kinds are the priorities.
const padding = 2

// metrics of the sampler.
type metrics struct {
	rows     [3]prometheus.Counter // live, background, padding
	batch    prometheus.Observer
	queued   prometheus.Gauge
	requests prometheus.Gauge
}

func newMetrics(r prometheus.Registerer, model string) (*metrics, error) {
	rows := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "decuwatch_sampler_rows_total",
		Help: "Rows of backbone work done, by kind: live, background, padding.",
	}, []string{"model", "kind"})
	batch := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "decuwatch_sampler_batch_rows",
		Help:    "Rows of one run of the backbone, padding included.",
		Buckets: []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512},
	}, []string{"model"})
	queued := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "decuwatch_sampler_queue_rows",
		Help: "Rows of backbone work that accepted requests still need.",
	}, []string{"model"})
	requests := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "decuwatch_sampler_requests",
		Help: "Requests that wait or run in the sampler.",
	}, []string{"model"})
	// Engines of several models share the collectors.
	if err := errors.Join(register(r, &rows), register(r, &batch), register(r, &queued),
		register(r, &requests)); err != nil {
		return nil, err
	}
	m := &metrics{
		batch:    batch.WithLabelValues(model),
		queued:   queued.WithLabelValues(model),
		requests: requests.WithLabelValues(model),
	}
	for i, kind := range []string{"live", "background", "padding"} {
		m.rows[i] = rows.WithLabelValues(model, kind)
	}
	return m, nil
}

// registerRunAge registers how long the sampler's oldest run is in progress.
func registerRunAge(r prometheus.Registerer, model string, s *sampler) error {
	if r == nil {
		return nil
	}
	age := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "decuwatch_sampler_run_age_seconds",
		Help:        "Age of the oldest run of the backbone in progress; 0 between runs.",
		ConstLabels: prometheus.Labels{"model": model},
	}, func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		age := time.Duration(0)
		for _, w := range s.workers {
			if w.busy {
				age = max(age, time.Since(w.began))
			}
		}
		return age.Seconds()
	})
	return register(r, &age)
}

// register registers c, or puts the collector that is registered already in its place.
func register[C prometheus.Collector](r prometheus.Registerer, c *C) error {
	if r == nil {
		return nil
	}
	err := r.Register(*c)
	var already prometheus.AlreadyRegisteredError
	if errors.As(err, &already) {
		*c = already.ExistingCollector.(C)
		return nil
	}
	return err
}

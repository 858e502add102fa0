package scoring

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
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

// newMetrics registers the metrics of a model's sampler. Models share a registry. A nil reg registers nowhere.
func newMetrics(reg prometheus.Registerer, model string, runAge func() time.Duration) *metrics {
	auto := promauto.With(prometheus.WrapRegistererWith(prometheus.Labels{"model": model}, reg))
	rows := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "decuwatch_sampler_rows_total",
		Help: "Rows of backbone work done, by kind: live, background, padding.",
	}, []string{"kind"})
	auto.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "decuwatch_sampler_run_age_seconds",
		Help: "Age of the oldest run of backbone, decoder or judge in progress; 0 between runs.",
	}, func() float64 { return runAge().Seconds() })
	m := &metrics{
		batch: auto.NewHistogram(prometheus.HistogramOpts{
			Name:    "decuwatch_sampler_batch_rows",
			Help:    "Rows of one run of the backbone, padding included.",
			Buckets: []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512},
		}),
		queued: auto.NewGauge(prometheus.GaugeOpts{
			Name: "decuwatch_sampler_queue_rows",
			Help: "Rows of backbone work that accepted requests still need.",
		}),
		requests: auto.NewGauge(prometheus.GaugeOpts{
			Name: "decuwatch_sampler_requests",
			Help: "Requests that wait or run in the sampler.",
		}),
	}
	for i, kind := range []string{"live", "background", "padding"} {
		m.rows[i] = rows.WithLabelValues(kind)
	}
	return m
}

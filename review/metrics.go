package review

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	attempts                *prometheus.CounterVec
	seconds                 prometheus.Histogram
	pending, failed, oldest prometheus.Gauge
}

// newMetrics registers the metrics of evidence with reg; a nil reg registers nothing.
func newMetrics(reg prometheus.Registerer) *metrics {
	with := promauto.With(reg)
	gauge := func(name, help string) prometheus.Gauge {
		return with.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &metrics{
		attempts: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_evidence_attempts_total",
			Help: "Attempts to make the evidence of a review: done, retried or failed for good.",
		}, []string{"outcome"}),
		seconds: with.NewHistogram(prometheus.HistogramOpts{
			Name: "decuwatch_evidence_seconds", Help: "Time that the evidence of one review took, behind live work.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 15),
		}),
		pending: gauge("decuwatch_evidence_pending", "Reviews that wait for their evidence."),
		failed:  gauge("decuwatch_evidence_failed", "Reviews whose evidence failed for good."),
		oldest:  gauge("decuwatch_evidence_oldest_seconds", "Age of the oldest review that waits for its evidence."),
	}
	for _, outcome := range []string{"done", "retried", "failed"} {
		m.attempts.WithLabelValues(outcome)
	}
	return m
}

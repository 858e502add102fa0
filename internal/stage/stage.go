// Package stage declares the histogram of how long each stage of an event takes. Several packages register stages.
package stage

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.opentelemetry.io/otel/trace"
)

// Stage observes how long one stage takes.
type Stage struct{ histogram prometheus.Histogram }

// New registers the histogram of the named stage with reg. A nil reg registers nowhere.
func New(reg prometheus.Registerer, name string) Stage {
	return Stage{promauto.With(reg).NewHistogram(prometheus.HistogramOpts{
		Name:        "decuwatch_stage_seconds",
		Help:        "Seconds that each stage of an event takes.",
		ConstLabels: prometheus.Labels{"stage": name},
		Buckets:     prometheus.ExponentialBuckets(50e-6, 2.5, 16),
	})}
}

// Since observes the time since start. A sampled trace in ctx becomes the exemplar.
func (s Stage) Since(ctx context.Context, start time.Time) {
	took := time.Since(start).Seconds()
	span := trace.SpanContextFromContext(ctx)
	if e, ok := s.histogram.(prometheus.ExemplarObserver); ok && span.IsSampled() {
		e.ObserveWithExemplar(took, prometheus.Labels{"trace_id": span.TraceID().String()})
		return
	}
	s.histogram.Observe(took)
}

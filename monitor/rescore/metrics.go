package rescore

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/schema"
)

// Outcomes of an attempt, labels of a metric.
const (
	outcomeScored  = "scored"
	outcomeKnown   = "known"   // it had a score already
	outcomeFailed  = "failed"  // it cannot be scored, and why is recorded
	outcomeRetried = "retried" // it is tried again
)

type metrics struct {
	done   *prometheus.CounterVec
	behind *prometheus.GaugeVec
}

func newMetrics(reg prometheus.Registerer, targets []Target) *metrics {
	m := &metrics{
		done: promauto.With(reg).NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_rescored_events_total",
			Help: "Attempts to score stored events again, by purpose (shadow, rescore) and outcome " +
				"(scored, known, failed, retried).",
		}, []string{"model", "purpose", "outcome"}),
		behind: promauto.With(reg).NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_shadow_behind_seconds",
			Help: "Age of the newest verdict that was given to the shadow ensemble.",
		}, []string{"model"}),
	}
	for _, t := range targets {
		for _, outcome := range []string{outcomeScored, outcomeKnown, outcomeFailed, outcomeRetried} {
			m.done.WithLabelValues(t.Series.Model, string(schema.PurposeRescore), outcome)
			if t.Shadow {
				m.done.WithLabelValues(t.Series.Model, string(schema.PurposeShadow), outcome)
			}
		}
	}
	return m
}

package canary

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/schema/postgres"
)

type metrics struct {
	decided *prometheus.CounterVec
	last    *prometheus.GaugeVec
}

// newMetrics registers the metrics of the given models. A nil reg registers nowhere.
func newMetrics(reg prometheus.Registerer, models []string) *metrics {
	auto := promauto.With(reg)
	m := &metrics{
		decided: auto.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_canaries_total", Help: "Canaries by outcome: caught by an alert in time, or missed.",
		}, []string{"model", "outcome"}),
		last: auto.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_canary_last_caught_timestamp_seconds",
			Help: "When a canary was last found to be caught; 0 before the first.",
		}, []string{"model"}),
	}
	for _, model := range models {
		m.decided.WithLabelValues(model, string(postgres.CanaryCaught))
		m.decided.WithLabelValues(model, string(postgres.CanaryMissed))
		m.last.WithLabelValues(model)
	}
	return m
}

// closed counts a canary that was decided.
func (m *metrics) closed(c postgres.Canary) {
	m.decided.WithLabelValues(c.Model, string(c.Outcome)).Inc()
	if c.Outcome == postgres.CanaryCaught {
		m.last.WithLabelValues(c.Model).SetToCurrentTime()
	}
}

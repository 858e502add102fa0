package alerts

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/internal/stage"
	"github.com/decuwatch/decuwatch/schema"
)

// Metrics counts what becomes of alerts on their way to the sinks, and how old thresholds are.
type Metrics struct {
	publish  stage.Stage
	attempts *prometheus.CounterVec
	pending  *prometheus.GaugeVec
	oldest   *prometheus.GaugeVec
	age      *prometheus.GaugeVec
	silences *prometheus.GaugeVec
	models   []string
}

// NewMetrics registers the metrics of the given models and sinks with reg, so that each series starts at zero. A nil
// reg registers nothing.
func NewMetrics(reg prometheus.Registerer, models []string, sinks []schema.Sink) *Metrics {
	with := promauto.With(reg)
	m := &Metrics{
		publish: stage.New(reg, "publish"),
		attempts: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_outbox_attempts_total",
			Help: "Attempts to send an alert, by sink and result (sent, failed).",
		}, []string{"sink", "result"}),
		pending: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_outbox_pending",
			Help: "Alerts that a sink has not taken yet.",
		}, []string{"sink"}),
		oldest: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_outbox_oldest_seconds",
			Help: "Age of the oldest alert that a sink has not taken yet; 0 if there is none.",
		}, []string{"sink"}),
		age: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_threshold_age_seconds",
			Help: "Age of the newest threshold of a model; 0 without one.",
		}, []string{"model"}),
		silences: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_silences_in_force",
			Help: "Silences of a model that keep alerts from being sent now.",
		}, []string{"model"}),
		models: models,
	}
	for _, model := range models {
		m.age.WithLabelValues(model)
		m.silences.WithLabelValues(model)
	}
	for _, sink := range sinks {
		m.attempts.WithLabelValues(string(sink), "sent")
		m.attempts.WithLabelValues(string(sink), "failed")
		m.pending.WithLabelValues(string(sink))
		m.oldest.WithLabelValues(string(sink))
	}
	return m
}

func (m *Metrics) sent(ctx context.Context, sink schema.Sink, start time.Time, err error) {
	m.publish.Since(ctx, start)
	result := "sent"
	if err != nil {
		result = "failed"
	}
	m.attempts.WithLabelValues(string(sink), result).Inc()
}

func (m *Metrics) setOutbox(sinks []Sink, stats []schema.OutboxStats) {
	due := map[schema.Sink]schema.OutboxStats{}
	for _, s := range stats {
		due[s.Sink] = s
	}
	for _, sink := range sinks {
		s := due[sink.Name()]
		m.pending.WithLabelValues(string(sink.Name())).Set(float64(s.Pending))
		m.oldest.WithLabelValues(string(sink.Name())).Set(s.Oldest.Seconds())
	}
}

func (m *Metrics) setSilences(counts map[string]int) {
	for _, model := range m.models {
		m.silences.WithLabelValues(model).Set(float64(counts[model]))
	}
}

func (m *Metrics) setThresholds(t *Table) {
	for _, model := range m.models {
		age := 0.0
		if at, ok := t.newest[model]; ok {
			age = max(0, time.Since(time.Unix(0, at)).Seconds())
		}
		m.age.WithLabelValues(model).Set(age)
	}
}

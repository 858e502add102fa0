package consumers

import (
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// keeperMetrics are the metrics of the stream and its consumers, from the server's numbers.
type keeperMetrics struct {
	messages, bytes, full       prometheus.Gauge
	pending, ackPending, oldest *prometheus.GaugeVec
	paused, orphaned            *prometheus.GaugeVec
	purged, lost                prometheus.Counter
	lastCheck                   prometheus.Gauge
	models                      map[string]bool
}

func newKeeperMetrics(reg prometheus.Registerer, models []string) *keeperMetrics {
	with := promauto.With(reg)
	gauge := func(name, help string) prometheus.Gauge {
		return with.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	byModel := func(name, help string) *prometheus.GaugeVec {
		return with.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, []string{"model"})
	}
	counter := func(name, help string) prometheus.Counter {
		return with.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &keeperMetrics{
		messages: gauge("decuwatch_stream_messages", "Messages in the stream of events."),
		bytes:    gauge("decuwatch_stream_bytes", "Size of the stream of events, in bytes."),
		full: gauge("decuwatch_stream_full_ratio",
			"Share of the limit of the stream of events that is used; at 1 producers are refused."),
		pending: byModel("decuwatch_consumer_pending_events", "Events that no worker has taken yet, by model."),
		ackPending: byModel("decuwatch_consumer_ack_pending_events",
			"Events that workers have taken and not acknowledged, by model."),
		oldest: byModel("decuwatch_consumer_oldest_event_seconds",
			"Age of the oldest event that waits for its verdict, by model; 0 if there is none."),
		paused: byModel("decuwatch_consumer_paused", "1 while an operator has paused the model's consumer."),
		orphaned: byModel("decuwatch_orphaned_events",
			"Events without a verdict whose consumer nobody pulls from, by model."),
		purged: counter("decuwatch_stream_purged_events_total",
			"Settled messages that this worker purged from the stream."),
		lost: counter("decuwatch_lost_events_total", "Messages that left the stream without a verdict."),
		lastCheck: gauge("decuwatch_stream_checked_timestamp_seconds",
			"When the stream and its consumers were last read successfully, in Unix time."),
		models: map[string]bool{},
	}
	for _, model := range models {
		for _, v := range m.byModel() {
			v.WithLabelValues(model)
		}
	}
	return m
}

func (m *keeperMetrics) byModel() []*prometheus.GaugeVec {
	return []*prometheus.GaugeVec{m.pending, m.ackPending, m.oldest, m.paused, m.orphaned}
}

func (m *keeperMetrics) checked() { m.lastCheck.SetToCurrentTime() }

func (m *keeperMetrics) stream(v *View) {
	m.messages.Set(float64(v.State.Msgs))
	m.bytes.Set(float64(v.State.Bytes))
	m.full.Set(share(v))
}

func (m *keeperMetrics) consumer(model string, c jetstream.ConsumerInfo, oldest time.Duration, orphans int) {
	m.pending.WithLabelValues(model).Set(float64(c.NumPending))
	m.ackPending.WithLabelValues(model).Set(float64(c.NumAckPending))
	m.oldest.WithLabelValues(model).Set(oldest.Seconds())
	m.orphaned.WithLabelValues(model).Set(float64(orphans))
	paused := 0.0
	if c.Paused {
		paused = 1
	}
	m.paused.WithLabelValues(model).Set(paused)
}

// forget deletes the series of models whose consumers are gone.
func (m *keeperMetrics) forget(models map[string]bool) {
	for model := range m.models {
		if !models[model] {
			for _, v := range m.byModel() {
				v.DeleteLabelValues(model)
			}
		}
	}
	m.models = models
}

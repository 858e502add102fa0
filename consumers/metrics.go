package consumers

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/schema"
)

// Metrics counts what the consumers do.
type Metrics struct {
	redeliveries *prometheus.CounterVec
	deadLetters  *prometheus.CounterVec
	decode       prometheus.Histogram
	queue        prometheus.Histogram
	ack          prometheus.Histogram
	paused       prometheus.Gauge
	keeper       *keeperMetrics
}

// NewMetrics registers the metrics of the given models with reg, so that each series begins at zero. A nil reg
// registers nowhere.
func NewMetrics(reg prometheus.Registerer, models []string) *Metrics {
	m := &Metrics{
		redeliveries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_redeliveries_total",
			Help: "Messages that were delivered again, by model.",
		}, []string{"model"}),
		deadLetters: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_dead_letters_total",
			Help: "Messages that became a dead letter, by kind.",
		}, []string{"kind"}),
		decode: stage("decode"),
		queue:  stage("queue"),
		ack:    stage("ack"),
		keeper: newKeeperMetrics(),
		paused: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "decuwatch_pulling_paused",
			Help: "1 while no messages are pulled because a dependency is away.",
		}),
	}
	for _, model := range models {
		m.redeliveries.WithLabelValues(model)
	}
	for _, kind := range schema.DeadLetterKinds() {
		m.deadLetters.WithLabelValues(string(kind))
	}
	m.keeper.register(reg, models)
	if reg != nil {
		reg.MustRegister(m.redeliveries, m.deadLetters, m.decode, m.queue, m.ack, m.paused)
	}
	return m
}

// stage returns the histogram of one stage. Other packages register their stages under the same name and help.
func stage(name string) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:        "decuwatch_stage_seconds",
		Help:        "Seconds by stage of an event's way.",
		ConstLabels: prometheus.Labels{"stage": name},
		Buckets:     prometheus.ExponentialBuckets(50e-6, 2.5, 16),
	})
}

func (m *Metrics) redelivered(model string) { m.redeliveries.WithLabelValues(model).Inc() }

func (m *Metrics) deadLetter(kind schema.DeadLetterKind) {
	m.deadLetters.WithLabelValues(string(kind)).Inc()
}

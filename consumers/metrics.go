package consumers

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/internal/stage"
	"github.com/decuwatch/decuwatch/schema"
)

// Metrics are the metrics of a [Runner].
type Metrics struct {
	redeliveries *prometheus.CounterVec
	deadLetters  *prometheus.CounterVec
	paused       prometheus.Gauge
	decode       stage.Stage
	queue        stage.Stage
	ack          stage.Stage
	keeper       *keeperMetrics
}

// NewMetrics registers the metrics of the given models with reg. A nil reg registers nowhere.
func NewMetrics(reg prometheus.Registerer, models []string) *Metrics {
	with := promauto.With(reg)
	m := &Metrics{
		redeliveries: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_redeliveries_total",
			Help: "Messages that were delivered again, by model.",
		}, []string{"model"}),
		deadLetters: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_dead_letters_total",
			Help: "Messages that became a dead letter, by kind.",
		}, []string{"kind"}),
		paused: with.NewGauge(prometheus.GaugeOpts{
			Name: "decuwatch_pulling_paused",
			Help: "1 while no messages are pulled because a dependency is away.",
		}),
		decode: stage.New(reg, "decode"),
		queue:  stage.New(reg, "queue"),
		ack:    stage.New(reg, "ack"),
		keeper: newKeeperMetrics(reg, models),
	}
	for _, model := range models {
		m.redeliveries.WithLabelValues(model)
	}
	for _, kind := range schema.DeadLetterKinds() {
		m.deadLetters.WithLabelValues(string(kind))
	}
	return m
}

func (m *Metrics) redelivered(model string) { m.redeliveries.WithLabelValues(model).Inc() }

func (m *Metrics) deadLetter(kind schema.DeadLetterKind) {
	m.deadLetters.WithLabelValues(string(kind)).Inc()
}

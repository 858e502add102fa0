package patrol

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/schema"
)

type metrics struct {
	raised   *prometheus.CounterVec
	heldBack *prometheus.CounterVec
	stale    *prometheus.GaugeVec
	shadow   *prometheus.GaugeVec

	closedForm *prometheus.GaugeVec
}

// Ends of the ratios of a model's classes.
const (
	endLeast    = "least"
	endGreatest = "greatest"
)

// newMetrics registers the metrics of the models with reg; a nil reg registers nothing.
func newMetrics(reg prometheus.Registerer, models []Model) *metrics {
	with := promauto.With(reg)
	m := &metrics{
		raised: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_patrol_alerts_total",
			Help: "Alerts about no single score, by kind (class_drift, threshold_missing, summary).",
		}, []string{"model", "kind"}),
		heldBack: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_alerts_held_back_total",
			Help: "Alerts that were stored but not sent, by reason (class_budget, model_budget, cool_down); " +
				"counted when their summary is raised.",
		}, []string{"model", "reason"}),
		stale: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_thresholds_stale",
			Help: "1 if the model has or had thresholds of the measurement, but none applies to the ensemble and settings " +
				"that score now.",
		}, []string{"model", "measurement"}),
		shadow: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_threshold_shadow_ratio",
			Help: "Rolling quantile of well-sampled classes, at the rate of the model's threshold, over that " +
				"threshold: 1 is no drift; 0 if unknown.",
		}, []string{"model", "measurement"}),
		closedForm: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_class_gap_closed_form_ratio",
			Help: "Measured mean distance of class_gap over the one that the ensemble's closed form expects: the least " +
				"and the greatest of the model's classes; 0 if unknown.",
		}, []string{"model", "end"}),
	}
	for _, model := range models {
		for _, kind := range []schema.AlertKind{
			schema.AlertSummary, schema.AlertClassDrift, schema.AlertThresholdMissing,
		} {
			m.raised.WithLabelValues(model.Name, string(kind))
		}
		for _, reason := range []string{"class_budget", "model_budget", "cool_down"} {
			m.heldBack.WithLabelValues(model.Name, reason)
		}
		m.closedForm.WithLabelValues(model.Name, endLeast)
		m.closedForm.WithLabelValues(model.Name, endGreatest)
		for _, measurement := range schema.MeasurementNames() {
			m.stale.WithLabelValues(model.Name, string(measurement))
			m.shadow.WithLabelValues(model.Name, string(measurement))
		}
	}
	return m
}

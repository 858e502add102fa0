package monitor

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/internal/stage"
	"github.com/decuwatch/decuwatch/schema"
)

const (
	// outcomeKnown counts an event that was delivered or published again: the first verdict stood.
	outcomeKnown schema.Outcome = "known"

	noReason     = "none"
	otherClasses = "all"
	unknownModel = "unknown"
)

type metrics struct {
	events    *prometheus.CounterVec
	scores    *prometheus.HistogramVec
	alerts    *prometheus.CounterVec
	silenced  *prometheus.CounterVec
	saturated *prometheus.CounterVec
	missing   *prometheus.CounterVec
	fallbacks *prometheus.CounterVec
	score     stage.Stage
	decide    stage.Stage
	commit    stage.Stage

	models map[string]bool // whether each class has series of its own
}

func newMetrics(reg prometheus.Registerer, models map[string]Model, maxClassSeries int) *metrics {
	with := promauto.With(reg)
	m := &metrics{
		events: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_events_total",
			Help: "Events that came to their verdict, by outcome (score, skip, dead_letter, known) and reason.",
		}, []string{"model", "outcome", "reason"}),
		scores: with.NewHistogramVec(prometheus.HistogramOpts{
			Name: "decuwatch_score",
			Help: "Measurements of scores, in the unit of their estimator (nats for PaiDE, a probability for " +
				"image_risk).",
			Buckets:                        prometheus.ExponentialBuckets(1e-4, 2, 18),
			NativeHistogramBucketFactor:    1.1,
			NativeHistogramMaxBucketNumber: 160,
		}, []string{"model", "class", "measurement"}),
		silenced: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_alerts_silenced_total",
			Help: "Alerts that were stored but not sent because of a silence.",
		}, []string{"model", "severity", "measurement"}),
		alerts: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_alerts_total",
			Help: "Alerts that were committed, by severity and reason.",
		}, []string{"model", "severity", "reason"}),
		saturated: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_saturated_scores_total",
			Help: "Measurements at their upper bound, which were decided on their mean distance.",
		}, []string{"model", "measurement"}),
		missing: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_unmeasured_scores_total",
			Help: "Measurements that scores lack, by reason: below_cut of request_risk, no_judge, judge_cannot_tell and " +
				"not_finite of image_risk.",
		}, []string{"model", "reason"}),
		fallbacks: with.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_threshold_fallbacks_total",
			Help: "Measurements that the class's own threshold did not decide, by the reason.",
		}, []string{"model", "reason"}),
		score:  stage.New(reg, "score"),
		decide: stage.New(reg, "decide"),
		commit: stage.New(reg, "commit"),
		models: map[string]bool{},
	}
	for name, model := range models {
		m.models[name] = len(model.Classes) <= maxClassSeries
		m.create(name, model.Classes)
	}
	for _, kind := range schema.DeadLetterKinds() {
		m.events.WithLabelValues(unknownModel, string(schema.OutcomeDeadLetter), string(kind))
	}
	return m
}

// create creates the series of a model, so that they start at zero.
func (m *metrics) create(model string, classes []string) {
	for _, outcome := range []schema.Outcome{schema.OutcomeScore, outcomeKnown} {
		m.events.WithLabelValues(model, string(outcome), noReason)
	}
	for _, reason := range schema.SkipReasons() {
		m.events.WithLabelValues(model, string(schema.OutcomeSkip), string(reason))
	}
	for _, kind := range schema.DeadLetterKinds() {
		m.events.WithLabelValues(model, string(schema.OutcomeDeadLetter), string(kind))
	}
	for _, severity := range schema.Severities() {
		for _, reason := range []schema.Reason{
			schema.ReasonClass, schema.ReasonCluster, schema.ReasonModel, schema.ReasonLimit,
		} {
			m.alerts.WithLabelValues(model, string(severity), string(reason))
		}
		for _, measurement := range schema.MeasurementNames() {
			m.silenced.WithLabelValues(model, string(severity), string(measurement))
		}
	}
	for _, reason := range schema.UnmeasuredReasons() {
		m.missing.WithLabelValues(model, string(reason))
	}
	for _, reason := range alerts.Fallbacks() {
		m.fallbacks.WithLabelValues(model, string(reason))
	}
	for _, measurement := range schema.MeasurementNames() {
		m.saturated.WithLabelValues(model, string(measurement))
		for _, class := range classes {
			m.scores.WithLabelValues(model, m.class(model, class), string(measurement))
		}
	}
}

// class returns the label value of a class.
func (m *metrics) class(model, class string) string {
	if m.models[model] {
		return class
	}
	return otherClasses
}

func (m *metrics) event(model string, outcome schema.Outcome, reason string) {
	if _, ok := m.models[model]; !ok {
		model = unknownModel // names come from outside
	}
	m.events.WithLabelValues(model, string(outcome), reason).Inc()
}

// verdict counts a verdict that was committed, or that found another one standing.
func (m *metrics) verdict(v schema.Verdict, first bool, findings []alerts.Finding) {
	switch {
	case v.DeadLetter != nil:
		model := strings.TrimPrefix(v.DeadLetter.Subject, schema.SubjectGeneration(""))
		if first {
			m.event(model, schema.OutcomeDeadLetter, string(v.DeadLetter.Kind))
		} else {
			m.event(model, outcomeKnown, noReason)
		}
	case v.Skip != nil:
		if first {
			m.event(v.Skip.Event.Data.Model, schema.OutcomeSkip, string(v.Skip.Reason))
		} else {
			m.event(v.Skip.Event.Data.Model, outcomeKnown, noReason)
		}
	case !first:
		m.event(v.Score.Event.Data.Model, outcomeKnown, noReason)
	default:
		m.scored(v, findings)
	}
}

func (m *metrics) scored(v schema.Verdict, findings []alerts.Finding) {
	s := v.Score
	model := s.Event.Data.Model
	m.event(model, schema.OutcomeScore, noReason)
	for _, measured := range s.Measurements() {
		m.scores.WithLabelValues(model, m.class(model, s.ClassLabel), string(measured.Name)).Observe(measured.Value)
		if measured.Saturated {
			m.saturated.WithLabelValues(model, string(measured.Name)).Inc()
		}
	}
	for _, missing := range s.Unmeasured() {
		m.missing.WithLabelValues(model, string(missing.Reason)).Inc()
	}
	for _, f := range findings {
		if f.Fallback != "" {
			m.fallbacks.WithLabelValues(model, string(f.Fallback)).Inc()
		}
	}
	for _, a := range v.Alerts {
		m.alerts.WithLabelValues(model, string(a.Severity), string(a.Reason)).Inc()
	}
}

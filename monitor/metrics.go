package monitor

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"github.com/decuwatch/decuwatch/alerts"
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
	events     *prometheus.CounterVec
	scores     *prometheus.HistogramVec
	alerts     *prometheus.CounterVec
	saturated  *prometheus.CounterVec
	fallbacks  *prometheus.CounterVec
	scoring    prometheus.Histogram
	deciding   prometheus.Histogram
	committing prometheus.Histogram

	models map[string]bool // whether each class has series of its own
}

func newMetrics(o Options) (*metrics, error) {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_events_total",
			Help: "Events that came to their verdict, by outcome (score, skip, dead_letter, known) and reason.",
		}, []string{"model", "outcome", "reason"}),
		scores: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:                           "decuwatch_score",
			Help:                           "Measurements of scores, in the unit of their estimator (nats for PaiDE).",
			Buckets:                        prometheus.ExponentialBuckets(1e-4, 2, 18),
			NativeHistogramBucketFactor:    1.1,
			NativeHistogramMaxBucketNumber: 160,
		}, []string{"model", "class", "measurement"}),
		alerts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_alerts_total",
			Help: "Alerts that were committed, by severity and reason.",
		}, []string{"model", "severity", "reason"}),
		saturated: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_saturated_scores_total",
			Help: "Measurements that stood at their upper bound and were decided on their mean distance.",
		}, []string{"model", "measurement"}),
		fallbacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_threshold_fallbacks_total",
			Help: "Measurements that the class's own threshold did not decide, by what did (cluster, model) or why none did (missing, stale).",
		}, []string{"model", "reason"}),
		scoring:    stage("score"),
		deciding:   stage("decide"),
		committing: stage("commit"),
		models:     map[string]bool{},
	}
	for name, model := range o.Models {
		m.models[name] = len(model.Classes) <= o.MaxClassSeries
		m.events.WithLabelValues(name, string(schema.OutcomeScore), noReason)
		m.events.WithLabelValues(name, string(outcomeKnown), noReason)
		for _, reason := range schema.SkipReasons() {
			m.events.WithLabelValues(name, string(schema.OutcomeSkip), string(reason))
		}
		for _, severity := range schema.Severities() {
			for _, reason := range []schema.Reason{schema.ReasonClass, schema.ReasonCluster, schema.ReasonModel, schema.ReasonLimit} {
				m.alerts.WithLabelValues(name, string(severity), string(reason))
			}
		}
		for _, reason := range alerts.Fallbacks() {
			m.fallbacks.WithLabelValues(name, string(reason))
		}
		for _, measurement := range schema.MeasurementNames() {
			m.saturated.WithLabelValues(name, string(measurement))
			for _, class := range model.Classes {
				m.scores.WithLabelValues(name, m.class(name, class), string(measurement))
			}
		}
	}
	for _, kind := range schema.DeadLetterKinds() {
		for _, name := range append(slices.Collect(maps.Keys(m.models)), unknownModel) {
			m.events.WithLabelValues(name, string(schema.OutcomeDeadLetter), string(kind))
		}
	}
	if o.Registerer == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.events, m.scores, m.alerts, m.saturated, m.fallbacks, m.scoring, m.deciding, m.committing} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// stage returns the histogram of one stage; other packages register theirs under the same name and help.
func stage(name string) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:        "decuwatch_stage_seconds",
		Help:        "Seconds by stage of an event's way.",
		ConstLabels: prometheus.Labels{"stage": name},
		Buckets:     prometheus.ExponentialBuckets(50e-6, 2.5, 16),
	})
}

// observe observes a duration, with the trace that it belongs to as its exemplar.
func observe(ctx context.Context, h prometheus.Histogram, took time.Duration) {
	span := trace.SpanContextFromContext(ctx)
	if e, ok := h.(prometheus.ExemplarObserver); ok && span.IsSampled() {
		e.ObserveWithExemplar(took.Seconds(), prometheus.Labels{"trace_id": span.TraceID().String()})
		return
	}
	h.Observe(took.Seconds())
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
		m.score(v, findings)
	}
}

func (m *metrics) score(v schema.Verdict, findings []alerts.Finding) {
	s := v.Score
	model := s.Event.Data.Model
	m.event(model, schema.OutcomeScore, noReason)
	for _, measured := range s.Measurements() {
		m.scores.WithLabelValues(model, m.class(model, s.ClassLabel), string(measured.Name)).Observe(measured.Value)
		if measured.Saturated {
			m.saturated.WithLabelValues(model, string(measured.Name)).Inc()
		}
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

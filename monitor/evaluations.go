package monitor

import (
	"cmp"
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/log"
	"go.opentelemetry.io/otel/propagation"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
)

// evaluationEvent is the name of the log event that says what was measured on the output of a generative model
// (OpenTelemetry semantic conventions for generative AI, status Development).
const evaluationEvent = "gen_ai.evaluation.result"

// evaluate emits one log event for each measurement of a score that was committed, below the producer's own span if the
// event carries its trace context.
func (m *Monitor) evaluate(ctx context.Context, s schema.Score, findings []alerts.Finding) {
	if !m.evaluations.Enabled(ctx, log.EnabledParameters{EventName: evaluationEvent}) {
		return
	}
	ev := s.Event
	ctx = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{
		"traceparent": ev.TraceParent, "tracestate": ev.TraceState,
	})
	for i, measured := range s.Measurements() {
		var r log.Record
		r.SetEventName(evaluationEvent)
		r.SetTimestamp(s.ScoredAt)
		r.SetObservedTimestamp(time.Now())
		r.SetSeverity(log.SeverityInfo)
		r.AddAttributes(
			attribute.String("gen_ai.evaluation.name", "decuwatch."+string(measured.Name)),
			attribute.Float64("gen_ai.evaluation.score.value", measured.Value),
			attribute.String("gen_ai.evaluation.score.label", label(findings[i])),
			attribute.String("gen_ai.response.id", ev.ID),
			attribute.String("gen_ai.request.model", ev.Data.Model),
			attribute.String("cloudevents.event_source", ev.Source),
			attribute.String("decuwatch.class", s.ClassLabel),
			attribute.String("decuwatch.reason", string(findings[i].Reason)),
		)
		m.evaluations.Emit(ctx, r)
	}
}

// label returns the severity of the alert on a measurement, or else why none fired.
func label(f alerts.Finding) string { return cmp.Or(string(f.Severity), string(f.Reason)) }

// Package monitor brings one event to its verdict: rerun and measure it, decide whether it raises an alert, and commit
// score and alert in one transaction.
package monitor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// Scorer reruns requests through one ensemble.
type Scorer interface {
	Score(ctx context.Context, r scoring.Request) (scoring.Result, error)
	// Rows is what a request costs in rows of backbone work; 0 where Score would refuse its settings.
	Rows(r scoring.Request) int
}

// Decider holds a score against the thresholds that are current.
type Decider interface {
	Decide(s schema.Score) alerts.Decision
}

// Recorder keeps verdicts. Both methods fail with a *schema.Invalid of the field id where the event's identifier belongs
// to another message already.
type Recorder interface {
	// Recorded reports whether the event has its verdict already.
	Recorded(ctx context.Context, ev schema.Event, d schema.Delivery) (bool, error)
	// Record commits v, with its alerts, in one transaction. First is false where a verdict stood already: that one
	// stands, and nothing of v is kept.
	Record(ctx context.Context, v schema.Verdict) (first bool, err error)
}

// Options configure a Monitor.
type Options struct {
	Models     map[string]Model // by name. Required
	Decider    Decider          // Required
	Recorder   Recorder         // Required
	Registerer prometheus.Registerer
	// MaxClassSeries bounds the classes of a model that get a score histogram of their own; the scores of a model with
	// more classes share one with the class "all". Defaults to 100.
	MaxClassSeries int
	// SampleShare is the share of scores without an alert that enter review unmarked, so that recall can be estimated: 0 to
	// 1. Which do follows from the event's identity, so that every try agrees.
	SampleShare float64
	Tracer      trace.Tracer // Defaults to none
	Log         *slog.Logger // Defaults to slog.Default
}

// Monitor brings events to their verdict. It is safe for concurrent use.
type Monitor struct {
	models   map[string]Model
	decider  Decider
	recorder Recorder
	metrics  *metrics
	share    float64
	tracer   trace.Tracer
	log      *slog.Logger

	missing sync.Map // models and measurements whose missing threshold was logged
}

// New returns a monitor. It fails where a required option is missing or the metrics are registered already.
func New(o Options) (*Monitor, error) {
	if !(o.SampleShare >= 0 && o.SampleShare <= 1) {
		return nil, fmt.Errorf("monitor: SampleShare is %g, must be 0 to 1", o.SampleShare)
	}
	if len(o.Models) == 0 || o.Decider == nil || o.Recorder == nil {
		return nil, errors.New("monitor: Models, Decider and Recorder are required")
	}
	if o.MaxClassSeries == 0 {
		o.MaxClassSeries = 100
	}
	if o.Tracer == nil {
		o.Tracer = noop.NewTracerProvider().Tracer("")
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	m, err := newMetrics(o)
	if err != nil {
		return nil, fmt.Errorf("monitor: %w", err)
	}
	return &Monitor{
		models: o.Models, decider: o.Decider, recorder: o.Recorder, metrics: m, share: o.SampleShare, tracer: o.Tracer, log: o.Log,
	}, nil
}

// Handle brings one delivered event to its verdict and returns nil once that is committed. An event that has its verdict
// keeps it, at no cost in rows. The error has a method DeadLetterKind() schema.DeadLetterKind if retrying will not help; any other error
// may be tried again.
func (m *Monitor) Handle(ctx context.Context, ev schema.Event, d schema.Delivery) (err error) {
	ctx, end := m.consume(ctx, ev, d)
	defer func() { end(err) }()

	// Whatever the delivery count says: a consumer may have been restored or made anew, and a producer may repeat itself.
	if known, err := m.recorded(ctx, ev, d); known || err != nil {
		return err
	}
	model, ok := m.models[ev.Data.Model]
	if !ok {
		return permanent(schema.KindUnknownModel, "data.model", "no ensemble stands for %s here", ev.Data.Model)
	}
	plan, err := model.plan(ev)
	if err != nil {
		return err
	}
	result, plan, err := m.score(ctx, model, plan)
	if err != nil {
		return err
	}
	if plan.skip != nil {
		return m.commit(ctx, schema.Verdict{Delivery: d, Skip: plan.skip})
	}
	score := compose(ev, model, plan, result, now())
	decision := m.decide(score)
	v := schema.Verdict{Delivery: d, Score: &score, Alerts: decision.Alerts}
	v.Sampled = len(v.Alerts) == 0 && sampled(ev, m.share)
	return m.commit(ctx, v, decision.Findings...)
}

// ScoreOnce computes the verdict that Handle would commit, a score or a skip, without deciding or committing anything.
func ScoreOnce(ctx context.Context, model Model, ev schema.Event) (*schema.Score, *schema.Skip, error) {
	plan, err := model.plan(ev)
	if err != nil {
		return nil, nil, err
	}
	result, plan, err := model.score(ctx, plan)
	if err != nil {
		return nil, nil, err
	}
	if plan.skip != nil {
		return nil, plan.skip, nil
	}
	s := compose(ev, model, plan, result, now())
	return &s, nil, nil
}

// Rows returns the rows of backbone work that the event costs, at least 1.
func (m *Monitor) Rows(ev schema.Event) int {
	model, ok := m.models[ev.Data.Model]
	if !ok {
		return 1
	}
	plan, err := model.plan(ev)
	if err != nil || plan.skip != nil {
		return 1
	}
	rows := model.Scorer.Rows(plan.request)
	if rows == 0 { // settings that will be replaced by the fixed profile
		rows = model.Scorer.Rows(scoring.Request{})
	}
	return max(rows, 1)
}

// DeadLetter commits the verdict on a message that cannot be scored. Where it has a verdict already, that one stands.
func (m *Monitor) DeadLetter(ctx context.Context, v schema.Verdict) error { return m.commit(ctx, v) }

func (m *Monitor) recorded(ctx context.Context, ev schema.Event, d schema.Delivery) (bool, error) {
	known, err := m.recorder.Recorded(ctx, ev, d)
	if err != nil {
		return false, refusal(fmt.Errorf("look up verdict: %w", err))
	}
	if known {
		m.metrics.event(ev.Data.Model, outcomeKnown, noReason)
		m.log.DebugContext(ctx, "the first verdict stands", "source", ev.Source, "id", ev.ID, "delivered", d.Delivered)
	}
	return known, nil
}

// score reruns the request, as a span and a stage.
func (m *Monitor) score(ctx context.Context, model Model, p plan) (_ scoring.Result, _ plan, err error) {
	ctx, span := m.tracer.Start(ctx, "score")
	defer func() { finish(span, err) }()
	start := time.Now()
	result, p, err := model.score(ctx, p)
	if err == nil && p.skip == nil {
		span.SetAttributes(attribute.Int("decuwatch.rows", result.Receipt.Rows), attribute.Int("decuwatch.steps", result.Receipt.Steps),
			attribute.String("decuwatch.profile", result.Receipt.Profile))
		observe(ctx, m.metrics.scoring, time.Since(start))
	}
	return result, p, err
}

// now returns the time in the precision that the database keeps.
func now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

func (m *Monitor) decide(s schema.Score) alerts.Decision {
	start := time.Now()
	decision := m.decider.Decide(s)
	m.metrics.deciding.Observe(time.Since(start).Seconds())
	for _, f := range decision.Findings {
		m.warnMissing(s, f)
	}
	return decision
}

// commit records the verdict and counts it.
func (m *Monitor) commit(ctx context.Context, v schema.Verdict, findings ...alerts.Finding) (err error) {
	ctx, span := m.tracer.Start(ctx, "commit")
	defer func() { finish(span, err) }()
	start := time.Now()
	first, err := m.recorder.Record(ctx, v)
	if err != nil {
		return refusal(fmt.Errorf("commit verdict: %w", err))
	}
	observe(ctx, m.metrics.committing, time.Since(start))
	span.SetAttributes(attribute.Bool("decuwatch.first", first), attribute.Int("decuwatch.alerts", len(v.Alerts)))
	m.metrics.verdict(v, first, findings)
	if first && v.Score != nil {
		for _, a := range v.Alerts {
			m.log.InfoContext(ctx, "alert", "alert", a.ID, "model", a.Model, "class", a.ClassLabel, "severity", a.Severity, "reason", a.Reason,
				"measurement", a.Measurement, "value", a.Decided, "threshold", a.Threshold, "source", a.Source, "id", a.EventID)
		}
	}
	return nil
}

// warnMissing logs once, until it changes, that nothing can raise an alert for a measurement.
func (m *Monitor) warnMissing(s schema.Score, f alerts.Finding) {
	key := [3]string{s.Event.Data.Model, s.Receipt.Settings, string(f.Measurement)}
	if f.Reason != schema.ReasonNone && f.Reason != schema.ReasonStale {
		m.missing.Delete(key)
		return
	}
	if _, logged := m.missing.Swap(key, true); !logged {
		m.log.Warn("no threshold applies: scores are stored, but raise no alert", "model", s.Event.Data.Model, "measurement", f.Measurement,
			"reason", f.Reason, "settings", s.Receipt.Settings, "ensemble", s.Receipt.EnsembleDigest)
	}
}

// consume starts the span of one delivery, as a continuation of the producer's trace.
func (m *Monitor) consume(ctx context.Context, ev schema.Event, d schema.Delivery) (context.Context, func(error)) {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		ctx = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": ev.TraceParent, "tracestate": ev.TraceState})
	}
	ctx, span := m.tracer.Start(ctx, "handle", trace.WithAttributes(
		attribute.String("decuwatch.model", ev.Data.Model), attribute.String("cloudevents.event_source", ev.Source),
		attribute.String("cloudevents.event_id", ev.ID), attribute.Int("decuwatch.delivered", d.Delivered)))
	return ctx, func(err error) { finish(span, err) }
}

func finish(span trace.Span, err error) {
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
	}
	span.End()
}

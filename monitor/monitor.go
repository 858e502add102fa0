// Package monitor brings one event to its verdict: rerun and measure it, decide whether it raises an alert, and commit
// score and alert in one transaction.
package monitor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/log"
	nolog "go.opentelemetry.io/otel/log/noop"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/monitor/sampling"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// Scorer reruns requests through one ensemble.
type Scorer interface {
	// Validate returns the error with which Score would refuse a request before it does any work, or nil.
	Validate(r scoring.Request) error
	Score(ctx context.Context, r scoring.Request) (scoring.Result, error)
	// Rows returns what a request costs in rows of backbone work; 0 if Score would refuse its settings.
	Rows(r scoring.Request) int
}

// Latents reads the latents that events name.
type Latents interface {
	// Latent returns the object of a latent of an event that the stream stored at the given time. It waits a while for
	// one that may still arrive. The error wraps schema.ErrLatentMissing if there is none, and is a *schema.LatentError if
	// it cannot be used.
	Latent(ctx context.Context, ref schema.Latent, stored time.Time) ([]byte, error)
}

// Decider compares a score with the current thresholds.
type Decider interface {
	Decide(s schema.Score) alerts.Decision
}

// Recorder keeps verdicts. Both methods fail with a *schema.Invalid of the field id if the event's id belongs to
// another event already.
type Recorder interface {
	// Recorded reports whether the event has its verdict already.
	Recorded(ctx context.Context, ev schema.Event, d schema.Delivery) (bool, error)
	// Record commits v, with its alerts, in one transaction.
	Record(ctx context.Context, v schema.Verdict) (Recorded, error)
}

// Budget bounds the rows that events cost. See package monitor/budget.
type Budget interface {
	// Share returns the share of a model's events that is scored, beside what the sampling rules say.
	Share(ctx context.Context, model string, d schema.Delivery) (float64, error)
	// Take takes the rows of an event. It may wait for them. It returns false if the event is to be skipped.
	Take(ctx context.Context, model string, rows int, d schema.Delivery) (bool, error)
	// Give gives rows back that an event did not need.
	Give(model string, rows int)
}

// Recorded says what became of a verdict.
type Recorded struct {
	// First is false if the event had a verdict already: that one stands, and nothing of this one is kept.
	First    bool
	Withheld map[string]schema.Dispatch // why alerts are stored but not sent, by their ids
}

// Config is the configuration of a Monitor.
type Config struct {
	// MaxClassSeries bounds the classes of a model that get a score histogram of their own; the scores of a model with
	// more classes share one with the class "all". Defaults to 100.
	MaxClassSeries int
	// SampleShare is the share, from 0 to 1, of scores without an alert that enter review unmarked, so that recall can
	// be estimated. The event's identity decides which, so that every try agrees.
	SampleShare float64
	Sampling    sampling.Config       // which events are scored at all
	Budget      Budget                // nil bounds nothing
	Registerer  prometheus.Registerer // nil registers nowhere
	Tracer      trace.Tracer          // Defaults to none
	Evaluations log.Logger            // of the log events of evaluations. Defaults to none
	Log         *slog.Logger          // Defaults to slog.Default
}

// Monitor brings events to their verdict. It is safe for concurrent use.
type Monitor struct {
	models   map[string]Model
	decider  Decider
	recorder Recorder
	samplers map[string]sampling.Sampler // by model
	budget   Budget
	metrics  *metrics
	share    float64
	tracer   trace.Tracer
	log      *slog.Logger

	evaluations log.Logger

	missing sync.Map // thresholds whose absence was logged
}

// New returns a monitor of the models, which are given by name.
func New(models map[string]Model, decider Decider, recorder Recorder, c Config) (*Monitor, error) {
	if !(c.SampleShare >= 0 && c.SampleShare <= 1) {
		return nil, fmt.Errorf("monitor: SampleShare is %g, must be 0 to 1", c.SampleShare)
	}
	if len(models) == 0 || decider == nil || recorder == nil {
		return nil, errors.New("monitor: models, decider and recorder are required")
	}
	samplers, err := newSamplers(models, c)
	if err != nil {
		return nil, err
	}
	return &Monitor{
		models: models, decider: decider, recorder: recorder, share: c.SampleShare, samplers: samplers,
		budget:  cmp.Or[Budget](c.Budget, unbounded{}),
		metrics: newMetrics(c.Registerer, models, cmp.Or(c.MaxClassSeries, 100)),
		tracer:  cmp.Or[trace.Tracer](c.Tracer, noop.Tracer{}), log: cmp.Or(c.Log, slog.Default()),
		evaluations: cmp.Or[log.Logger](c.Evaluations, nolog.Logger{}),
	}, nil
}

// Plan decides how a delivered event comes to its verdict. It returns the rows of backbone work that this costs, at
// least 1, and a function that handles the delivery. It waits while the budget defers the event. The error says that it
// cannot be decided now.
//
// The function returns nil once the verdict is committed. An event that has its verdict keeps it, without a run. If
// retrying will not help, the function's error has a method DeadLetterKind() schema.DeadLetterKind.
func (m *Monitor) Plan(ctx context.Context, ev schema.Event, d schema.Delivery) (
	rows int, handle func(context.Context, schema.Delivery) error, err error,
) {
	p := plan{event: ev}
	p.err = permanent(schema.KindUnknownModel, "data.model", "there is no ensemble for %s", ev.Data.Model)
	if model, known := m.models[ev.Data.Model]; known {
		p = model.plan(ev)
		if err := m.spend(ctx, &p, d); err != nil {
			return 0, nil, err
		}
	}
	return p.rows(), func(ctx context.Context, d schema.Delivery) error { return m.handle(ctx, &p, d) }, nil
}

// handle brings one delivered event to its verdict. It may be called again after an error.
func (m *Monitor) handle(ctx context.Context, p *plan, d schema.Delivery) (err error) {
	ctx, end := m.span(ctx, p.event, d)
	defer func() { end(err) }()

	// The number of deliveries says nothing: a consumer may have been restored, and a producer may repeat itself.
	known, err := m.recorded(ctx, p.event, d)
	if known {
		m.giveBack(p)
	}
	switch {
	case known || err != nil:
		return err
	case p.err != nil:
		return p.err
	case p.skip != nil:
		return m.commit(ctx, schema.Verdict{Delivery: d, Skip: p.skip})
	}
	if skip, err := p.fetch(ctx, d.Time); skip != nil {
		m.giveBack(p)
		return m.commit(ctx, schema.Verdict{Delivery: d, Skip: skip})
	} else if err != nil {
		return err
	}
	result, err := m.score(ctx, p)
	if err != nil {
		return err
	}
	p.paid -= result.Receipt.Rows
	m.giveBack(p)
	score := p.compose(result)
	decision := m.decide(ctx, score)
	v := schema.Verdict{Delivery: d, Score: &score, Alerts: decision.Alerts}
	v.Sampled = len(v.Alerts) == 0 && drawn(p.event, "review", m.share)
	return m.commit(ctx, v, decision.Findings...)
}

// ScoreOnce computes the verdict that a Monitor would commit, a score or a skip. It decides and commits nothing.
func ScoreOnce(ctx context.Context, model Model, ev schema.Event) (*schema.Score, *schema.Skip, error) {
	p := model.plan(ev)
	if p.err != nil || p.skip != nil {
		return nil, p.skip, p.err
	}
	if skip, err := p.fetch(ctx, ev.Time); skip != nil || err != nil {
		return nil, skip, err
	}
	result, err := p.score(ctx)
	if err != nil {
		return nil, nil, err
	}
	s := p.compose(result)
	return &s, nil, nil
}

// Rescore computes a score of an event beside its verdict, behind live work. It follows the model's fixed profile, so
// that the scores compare, and its receipt says what could not be rerun as the event asks. It decides and commits
// nothing. If retrying will not help, the error has a method DeadLetterKind() schema.DeadLetterKind.
func Rescore(ctx context.Context, model Model, ev schema.Event) (*schema.Score, error) {
	model.AsRequested, model.SkipUnreproducible = false, false
	p := model.plan(ev)
	if p.err != nil {
		return nil, p.err
	}
	skip, err := p.skip, error(nil)
	if skip == nil {
		skip, err = p.fetch(ctx, ev.Time)
	}
	switch {
	case err != nil:
		return nil, err
	case skip != nil: // its latent is gone
		return nil, permanent(schema.DeadLetterKind(skip.Reason), "", "%s", skip.Detail)
	}
	p.request.Priority = scoring.Background
	result, err := p.score(ctx)
	if err != nil {
		return nil, err
	}
	s := p.compose(result)
	return &s, nil
}

// DeadLetter commits the verdict on a message that cannot be scored. If the message has a verdict already, that stands.
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
func (m *Monitor) score(ctx context.Context, p *plan) (_ scoring.Result, err error) {
	ctx, span := m.tracer.Start(ctx, "score")
	defer func() { finish(span, err) }()
	start := time.Now()
	result, err := p.score(ctx)
	if err == nil {
		span.SetAttributes(
			attribute.Int("decuwatch.rows", result.Receipt.Rows), attribute.Int("decuwatch.steps", result.Receipt.Steps),
			attribute.String("decuwatch.profile", result.Receipt.Profile))
		m.metrics.score.Since(ctx, start)
	}
	return result, err
}

func (m *Monitor) decide(ctx context.Context, s schema.Score) alerts.Decision {
	start := time.Now()
	decision := m.decider.Decide(s)
	m.metrics.decide.Since(ctx, start)
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
	recorded, err := m.recorder.Record(ctx, v)
	if err != nil {
		return refusal(fmt.Errorf("commit verdict: %w", err))
	}
	m.metrics.commit.Since(ctx, start)
	span.SetAttributes(attribute.Bool("decuwatch.first", recorded.First), attribute.Int("decuwatch.alerts", len(v.Alerts)))
	m.metrics.verdict(v, recorded.First, findings)
	if recorded.First && v.Score != nil {
		m.evaluate(ctx, *v.Score, findings)
		for _, a := range v.Alerts {
			m.logAlert(ctx, a, recorded.Withheld[a.ID])
		}
	}
	return nil
}

// logAlert logs an alert that is sent, or why it is not.
func (m *Monitor) logAlert(ctx context.Context, a schema.Alert, withheld schema.Dispatch) {
	log, says := m.log, "alert"
	switch withheld {
	case "", schema.DispatchOwed:
	case schema.DispatchSilenced:
		says = "alert silenced: it is stored, but not sent"
		m.metrics.silenced.WithLabelValues(a.Model, string(a.Severity), string(a.Measurement)).Inc()
	default:
		says = "alert held back: it is stored, but not sent"
		log = log.With("held_back", withheld)
	}
	log.InfoContext(ctx, says, "alert", a.ID, "model", a.Model, "class", a.ClassLabel,
		"severity", a.Severity, "reason", a.Reason, "measurement", a.Measurement, "value", a.Decided,
		"threshold", a.Threshold, "source", a.Source, "id", a.EventID)
}

// warnMissing logs once, until that changes, that no threshold applies to a measurement.
func (m *Monitor) warnMissing(s schema.Score, f alerts.Finding) {
	key := [3]string{s.Event.Data.Model, s.Receipt.Settings, string(f.Measurement)}
	if f.Reason != schema.ReasonNone && f.Reason != schema.ReasonStale {
		m.missing.Delete(key)
		return
	}
	if _, logged := m.missing.Swap(key, true); !logged {
		m.log.Warn("no threshold applies: scores are stored, but raise no alert", "model", s.Event.Data.Model,
			"measurement", f.Measurement, "reason", f.Reason, "settings", s.Receipt.Settings,
			"ensemble", s.Receipt.EnsembleDigest)
	}
}

// span starts the span of one delivery.
func (m *Monitor) span(ctx context.Context, ev schema.Event, d schema.Delivery) (context.Context, func(error)) {
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

package app

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploghttp"
	"go.opentelemetry.io/otel/log"
	"go.opentelemetry.io/otel/log/noop"
	sdklog "go.opentelemetry.io/otel/sdk/log"

	"github.com/decuwatch/decuwatch/internal/settings"
)

// newEvaluations returns a logger of evaluation events if the settings ask for them, and a function that flushes it.
// Emitting an event never waits: if the queue is full, the event is dropped and counted.
func newEvaluations(ctx context.Context, c TracingConfig, reg prometheus.Registerer) (log.Logger, func() error, error) {
	if !c.Evaluations {
		return noop.NewLoggerProvider().Logger(instrumentation), func() error { return nil }, nil
	}
	var options []otlploghttp.Option // the environment says the rest: OTEL_EXPORTER_OTLP_ENDPOINT, _HEADERS ...
	if c.Endpoint != "" {
		endpoint, err := url.Parse(c.Endpoint)
		if err != nil {
			return nil, nil, settings.Errorf("tracing.endpoint: %w", err)
		}
		options = append(options, otlploghttp.WithEndpointURL(endpoint.JoinPath("v1", "logs").String()))
	}
	exporter, err := otlploghttp.New(ctx, options...)
	if err != nil {
		return nil, nil, fmt.Errorf("tracing.evaluations: %w", err)
	}
	of, err := telemetryResource(ctx)
	if err != nil {
		return nil, nil, err
	}
	queue := newEvaluationQueue(exporter, reg)
	provider := sdklog.NewLoggerProvider(sdklog.WithProcessor(queue), sdklog.WithResource(of))
	return provider.Logger(instrumentation), func() error { return flush(ctx, provider.Shutdown) }, nil
}

// evaluationQueue counts what becomes of events around the batches of OpenTelemetry, which drop in silence.
type evaluationQueue struct {
	sdklog.Processor // batches, and exports through the evaluationExporter
	most             int64
	waiting          *atomic.Int64 // events that are queued or being exported
	dropped          prometheus.Counter
}

type evaluationExporter struct {
	sdklog.Exporter
	waiting      *atomic.Int64
	sent, failed prometheus.Counter
}

func newEvaluationQueue(exporter sdklog.Exporter, reg prometheus.Registerer) *evaluationQueue {
	counts := promauto.With(reg).NewCounterVec(prometheus.CounterOpts{
		Name: "decuwatch_evaluations_total",
		Help: "OpenTelemetry events of evaluations, by outcome: sent, failed, or dropped because the queue was full.",
	}, []string{"outcome"})
	most, err := strconv.ParseInt(os.Getenv("OTEL_BLRP_MAX_QUEUE_SIZE"), 10, 32)
	if err != nil || most < 1 {
		most = 2048 // the default of OpenTelemetry
	}
	waiting := new(atomic.Int64)
	return &evaluationQueue{
		Processor: sdklog.NewBatchProcessor(evaluationExporter{
			exporter, waiting, counts.WithLabelValues("sent"), counts.WithLabelValues("failed"),
		}),
		most: most, waiting: waiting, dropped: counts.WithLabelValues("dropped"),
	}
}

// OnEmit queues an event, unless the queue is full.
func (q *evaluationQueue) OnEmit(ctx context.Context, r *sdklog.Record) error {
	if q.waiting.Add(1) > q.most {
		q.waiting.Add(-1)
		q.dropped.Inc()
		return nil
	}
	return q.Processor.OnEmit(ctx, r)
}

// Export sends events, and counts whether that worked.
func (e evaluationExporter) Export(ctx context.Context, list []sdklog.Record) error {
	err := e.Exporter.Export(ctx, list)
	count := e.sent
	if err != nil {
		count = e.failed
	}
	count.Add(float64(len(list)))
	e.waiting.Add(-int64(len(list)))
	return err
}

package app

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/decuwatch/decuwatch/internal/settings"
)

// instrumentation is the name that decuwatch's spans carry.
const instrumentation = "github.com/decuwatch/decuwatch"

// newTracer returns a tracer whose spans go to the configured endpoint, and a function that flushes them.
func newTracer(ctx context.Context, c TracingConfig) (trace.Tracer, func() error, error) {
	if c.Endpoint == "" {
		return noop.NewTracerProvider().Tracer(instrumentation), func() error { return nil }, nil
	}
	endpoint, err := url.Parse(c.Endpoint)
	if err != nil {
		return nil, nil, settings.Errorf("tracing.endpoint: %w", err)
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(endpoint.JoinPath("v1", "traces").String()))
	if err != nil {
		return nil, nil, fmt.Errorf("tracing.endpoint: %w", err)
	}
	of, err := telemetryResource(ctx)
	if err != nil {
		return nil, nil, err
	}
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(c.SampleRatio))),
		sdktrace.WithResource(of),
	)
	return provider.Tracer(instrumentation), func() error { return flush(ctx, provider.Shutdown) }, nil
}

// telemetryResource says who sends spans and events: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
func telemetryResource(ctx context.Context) (*resource.Resource, error) {
	host, _ := os.Hostname() // "" leaves it out
	of, err := resource.New(ctx, resource.WithAttributes(
		attribute.String("service.name", "decuwatch"), attribute.String("host.name", host)), resource.WithFromEnv())
	if err != nil {
		return nil, settings.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	return of, nil
}

// flush shuts a provider down within a few seconds, after ctx has ended.
func flush(ctx context.Context, shutdown func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return shutdown(ctx)
}

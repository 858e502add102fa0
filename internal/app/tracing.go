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
	host, _ := os.Hostname() // "" leaves it out
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(c.SampleRatio))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "decuwatch"), attribute.String("host.name", host))),
	)
	return provider.Tracer(instrumentation), func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		return provider.Shutdown(ctx)
	}, nil
}

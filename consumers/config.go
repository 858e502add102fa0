package consumers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/decuwatch/decuwatch/internal/modelname"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

// StreamConfig is the stream of generation events. If the stream exists, it stays as its operator made it.
type StreamConfig struct {
	// Name of the stream.
	Name string `name:"name" default:"GENERATION"`
	// How long a new stream keeps messages.
	MaxAge time.Duration `name:"max-age" default:"168h" min:"1m"`
	// Maximum size of a new stream in bytes; a full stream refuses new events. Defaults to 8589934592 (8 GiB).
	MaxBytes int64 `name:"max-bytes" default:"8589934592" min:"1048576"`
	// Replicas of a new stream; use 3 if NATS is clustered.
	Replicas int `name:"replicas" default:"1" min:"1" max:"5"`
	// How long the stream keeps an event that has its verdict; it is purged earlier if the stream is more than 75%
	// full.
	KeepSettled time.Duration `name:"keep-settled" default:"24h" min:"1s"`
	// Interval at which settings, backlog, orphaned events and the ledger are checked.
	CheckInterval time.Duration `name:"check-interval" default:"10s" min:"1s"`
}

// Check returns an error that names the settings out of their bounds.
func (c StreamConfig) Check() error {
	return errors.Join(settings.StreamName("stream.name", c.Name), settings.Check("stream", c))
}

// Config is the configuration of a [Runner]. Fields with a name are settings.
type Config struct {
	// Silence of a worker after which its messages go to another worker.
	AckWait time.Duration `name:"ack-wait" default:"30s" min:"100ms"`
	// Failed attempts on one message before it becomes a dead letter; stopping or killing a worker is not a failure.
	MaxDeliver int `name:"max-deliver" default:"5" min:"1"`
	// Maximum messages of one model that a worker has in flight.
	MaxInFlight int `name:"max-in-flight" default:"256" min:"1"`
	// Maximum rows of backbone work that are admitted at once, over all models.
	MaxRows int `name:"max-rows" default:"4096" min:"1"`
	// Deadline of one event, counted from its admission.
	HandleTimeout time.Duration `name:"handle-timeout" default:"1m" min:"1ns"`
	// How long a stop waits for events in flight; the rest goes back to the stream.
	DrainTimeout time.Duration `name:"drain-timeout" default:"20s" min:"1ns"`
	// Delay before the second delivery; it doubles with each further one.
	RetryDelay time.Duration `name:"retry-delay" default:"1s" min:"1ns"`
	// Longest delay between two deliveries.
	RetryMaxDelay time.Duration `name:"retry-max-delay" default:"30s"`
	// How long an event waits while nobody pulls from its model's consumer; then it becomes a dead letter. Must be
	// below the stream's maximum age.
	OrphanGrace time.Duration `name:"orphan-grace" default:"24h" min:"1m"`

	Models []string     `kong:"-"` // names of the models whose events are consumed; at least one
	Stream StreamConfig `kong:"-"` // where the events come from

	PullExpiry time.Duration `kong:"-" default:"5s"` // how long the server keeps one pull open
	// How long an event of a model without a consumer waits before it becomes a dead letter.
	UnownedGrace time.Duration `kong:"-" default:"10s"`

	// Ledger has the verdicts. If it is nil, the keeper purges nothing and does not find lost messages.
	Ledger Ledger `kong:"-"`

	// Healthy returns nil if the handler's dependencies are there. It is called after a failure. While it fails, nothing
	// is pulled, and messages in flight are kept and tried again afterwards. Messages that have waited for HandleTimeout
	// go to another worker, unless Tries fails, too. Nil is always healthy.
	Healthy func(context.Context) error `kong:"-"`

	// Backlog is called after each look at the stream with what waits for a model. Nil is not called.
	Backlog func(model string, b Backlog) `kong:"-"`

	Tries Tries `kong:"-"` // counts attempts on messages. Nil counts in memory

	Logger  *slog.Logger `kong:"-"` // Defaults to slog.Default()
	Metrics *Metrics     `kong:"-"` // see [NewMetrics]. Nil registers nowhere
	Tracer  trace.Tracer `kong:"-"` // continues the producer's trace. Defaults to none
}

// Backlog is what waits in the stream for a model.
type Backlog struct {
	Events int           // that have no verdict
	Oldest time.Duration // age of the oldest of them
	MaxAge time.Duration // age at which the stream drops an event; 0 means never
}

// withDefaults returns c with defaults in place of zero values.
func (c Config) withDefaults() Config {
	grace := c.OrphanGrace
	c, c.Stream = settings.WithDefaults(c), settings.WithDefaults(c.Stream)
	if grace == 0 {
		c.OrphanGrace = min(c.OrphanGrace, c.Stream.MaxAge/2)
	}
	if c.Healthy == nil {
		c.Healthy = func(context.Context) error { return nil }
	}
	if c.Tries == nil {
		c.Tries = &memoryTries{sums: map[schema.Delivery]schema.Tries{}}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics(nil, c.Models)
	}
	if c.Tracer == nil {
		c.Tracer = noop.NewTracerProvider().Tracer("")
	}
	return c
}

// Check returns an error that names the settings out of their bounds. [New] does not ask.
func (c Config) Check() error {
	if c.RetryMaxDelay < c.RetryDelay {
		return errors.Join(settings.Check("consumers", c), settings.Errorf(
			"consumers.retry-max-delay is %s, must be at least %s", c.RetryMaxDelay, c.RetryDelay))
	}
	return settings.Check("consumers", c)
}

// maxAckPending is how many messages of one model all workers have in flight.
func (c Config) maxAckPending() int { return 4 * c.MaxInFlight }

// checkModels returns an error if the models cannot be consumed.
func (c Config) checkModels() error {
	if len(c.Models) == 0 {
		return errors.New("consumers: Models is empty: name at least one model")
	}
	for i, m := range c.Models {
		if !modelname.Valid(m) {
			return fmt.Errorf("consumers: Models: %q is not a model's name: %s", m, modelname.Rule)
		}
		if slices.Contains(c.Models[:i], m) {
			return fmt.Errorf("consumers: Models: %q is named twice", m)
		}
	}
	return nil
}

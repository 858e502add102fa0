package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/patrol"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor/budget"
	"github.com/decuwatch/decuwatch/monitor/rescore"
	"github.com/decuwatch/decuwatch/monitor/sampling"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// Config is every setting there is. A setting's name is its path (nats.url): a nested key of the YAML file, with
// DECUWATCH_ before it an environment variable, and a flag of the verbs that need it. The comment of its field
// documents it: help.txt and docs/configuration.md are made from these comments.
type Config struct {
	NATS      NATSConfig             `embed:"" prefix:"nats." group:"NATS"`
	Stream    consumers.StreamConfig `embed:"" prefix:"stream." group:"Stream of events"`
	Consumers consumers.Config       `embed:"" prefix:"consumers." group:"Consumers"`
	Latents   consumers.LatentConfig `embed:"" prefix:"latents." group:"Latents of events"`
	Scoring   ScoringConfig          `embed:"" prefix:"scoring." group:"Scoring"`
	Sampling  sampling.Config        `embed:"" prefix:"sampling." group:"Sampling"`
	Budget    budget.Config          `embed:"" prefix:"budget." group:"Budgets"`
	Postgres  PostgresConfig         `embed:"" prefix:"postgres." group:"Postgres"`
	Retention postgres.Maintenance   `embed:"" prefix:"retention." group:"Retention"`
	Alerts    alerts.Config          `embed:"" prefix:"alerts." group:"Alerts"`
	Volume    postgres.Volume        `embed:"" prefix:"volume." group:"Volume of alerts"`
	Patrol    patrol.Config          `embed:"" prefix:"patrol." group:"Patrol"`
	Review    ReviewConfig           `embed:"" prefix:"review." group:"Review"`
	Rescore   rescore.Config         `embed:"" prefix:"rescore." group:"Re-scores"`
	Metrics   MetricsConfig          `embed:"" prefix:"metrics." group:"Metrics and health"`
	Tracing   TracingConfig          `embed:"" prefix:"tracing." group:"Tracing"`
	Log       LogConfig              `kong:"-" prefix:"log." group:"Logging"` // a flag of every verb, in cli
}

// ScoringConfig says which ensembles score, and how.
type ScoringConfig struct {
	// Ensembles that score, one for each production model: directories, or manifests. Required.
	Ensembles []string `name:"ensembles" short:"e" placeholder:"PATH"`
	// Ensembles that score beside those of scoring.ensembles, at most one for each, under the same name. They get the
	// events that got a score, behind live work. Their scores are stored, and raise no alert. Defaults to none.
	Shadows []string `name:"shadows" placeholder:"PATH"`
	// Share of the events that shadow ensembles score.
	ShadowShare float64 `name:"shadow-share" default:"1" min:"0.001" max:"1"`
	scoring.Options
	// Settings that events are scored with: fixed uses the ensemble's, so that scores can be compared; as-requested
	// uses the event's.
	Profile string `name:"profile" default:"fixed" oneof:"fixed,as-requested"`
	// Class gap below which the request risk is not measured, so that its rows are free for other events, and the share
	// of these events, 0 to 1, whose request risk is measured all the same: 0.25,0.05. off always measures it; profile
	// does what the profile of the ensemble says.
	Cascade string `name:"cascade" default:"profile" placeholder:"CUT,SHARE"`
	// Treatment of an event that cannot be rerun as its producer ran it: score (the receipt says what was replaced)
	// or skip (recorded with the reason).
	Unreproducible string `name:"unreproducible" default:"score" oneof:"score,skip"`
}

// Check returns an error that names the settings out of their bounds.
func (c ScoringConfig) Check() error {
	_, err := c.cascade(scoring.Cascade{})
	errs := []error{settings.Check("scoring", c), c.Options.Check(), err}
	if len(c.Ensembles) == 0 {
		errs = append(errs, settings.Errorf(
			"scoring.ensembles is empty, must name at least one ensemble directory: -e ensembles/fashion-mnist"))
	}
	return errors.Join(errs...)
}

// cascade returns the cascade of an ensemble whose profile has the given one.
func (c ScoringConfig) cascade(profile scoring.Cascade) (scoring.Cascade, error) {
	switch c.Cascade {
	case "profile":
		return profile, nil
	case "off":
		return scoring.Cascade{}, nil
	}
	cut, share, ok := strings.Cut(c.Cascade, ",")
	var set scoring.Cascade
	var errs [2]error
	set.Cut, errs[0] = strconv.ParseFloat(cut, 64)
	set.Share, errs[1] = strconv.ParseFloat(share, 64)
	if !ok || errors.Join(errs[:]...) != nil || set == (scoring.Cascade{}) {
		return set, settings.Errorf("scoring.cascade is %q, must be off, profile, or a cut and a share: 0.25,0.05", c.Cascade)
	}
	if err := set.Validate(); err != nil {
		return set, settings.Errorf("scoring.cascade is %q: %w", c.Cascade, err)
	}
	return set, nil
}

// PostgresConfig says how Postgres is reached.
type PostgresConfig struct {
	postgres.Config
	// Let serve create and upgrade the tables when it starts; its database user needs the right to do so.
	Migrate bool `name:"migrate"`
}

// Open opens the store, which owes each alert to the sinks. Without any, that is the stream of alerts.
func (c PostgresConfig) Open(ctx context.Context, log *slog.Logger, sinks ...schema.Sink) (*postgres.Store, error) {
	c.Log, c.Sinks = log, sinks
	return postgres.Open(ctx, c.Config)
}

// migrate creates and upgrades the tables if the configuration says so. Newer tables, as after a rollback of the
// program, stay: they work.
func (c PostgresConfig) migrate(ctx context.Context, log *slog.Logger) error {
	if !c.Migrate {
		return nil
	}
	err := postgres.Migrate(ctx, c.URL)
	if errors.Is(err, postgres.ErrNewer) {
		log.Warn("the tables are left as they are", "err", err)
		return nil
	}
	return err
}

// MetricsConfig is where metrics, health and profiles are served.
type MetricsConfig struct {
	// Address of /metrics, /healthz and /readyz; port 0 is any free one. It has no authentication: keep it on a network
	// of your own.
	Address string `name:"address" default:"127.0.0.1:9464"`
	// Serve Go's profiles below /debug/pprof/.
	Pprof bool `name:"pprof"`
	HTTPTLSConfig
	// Maximum difference between the clock of the worker and the clocks of Postgres and JetStream; beyond it the
	// worker is not ready.
	ClockTolerance time.Duration `name:"clock-tolerance" default:"30s" min:"1s"`
	// Maximum classes of a model for each to have a score histogram of its own; if there are more, they share one.
	MaxClassSeries int `name:"max-class-series" default:"100" min:"1"`
}

// Check returns an error that names the settings out of their bounds.
func (c MetricsConfig) Check() error {
	return errors.Join(settings.HostPort("metrics.address", c.Address), c.pair("metrics"), settings.Check("metrics", c))
}

// HTTPTLSConfig is the certificate of an HTTP server.
type HTTPTLSConfig struct {
	// PEM file with the server's certificate and its chain; read again when it changes. Defaults to none: plain HTTP.
	TLSCert string `name:"tls-cert" placeholder:"FILE"`
	// PEM file with the certificate's private key. Defaults to none.
	TLSKey string `name:"tls-key" placeholder:"FILE"`
}

// TracingConfig says where spans go.
type TracingConfig struct {
	// OTLP/HTTP endpoint that spans are sent to, without /v1/traces: http://127.0.0.1:4318. Defaults to none: no spans.
	Endpoint string `name:"endpoint" placeholder:"URL"`
	// Share of new traces that are sampled, 0 to 1; a trace that a producer began keeps the producer's decision.
	SampleRatio float64 `name:"sample-ratio" default:"1" min:"0" max:"1"`
	// Send an OpenTelemetry log event gen_ai.evaluation.result for each measurement of a score, by OTLP/HTTP to
	// tracing.endpoint with /v1/logs. Without an endpoint, OTEL_EXPORTER_OTLP_ENDPOINT says where.
	Evaluations bool `name:"evaluations"`
}

// Check returns an error that names the settings out of their bounds.
func (c TracingConfig) Check() error {
	return errors.Join(settings.WebAddress("tracing.endpoint", c.Endpoint), settings.Check("tracing", c))
}

// LogConfig says what is logged, to stderr.
type LogConfig struct {
	// Lowest level that is logged: debug, info, warn or error.
	Level string `name:"level" default:"info"`
	// Format of the log: text or json.
	Format string `name:"format" default:"text" oneof:"text,json"`
}

// Logger returns a logger that writes to w.
func (c LogConfig) Logger(w io.Writer) (*slog.Logger, error) {
	if err := settings.Check("log", c); err != nil {
		return nil, err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		return nil, settings.Errorf("log.level is %q, must be debug, info, warn or error", c.Level)
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return slog.New(slog.NewTextHandler(w, opts)), nil
}

// Check returns an error that names the settings out of their bounds.
func (c Config) Check() error {
	var errs []error
	groups := reflect.ValueOf(c)
	for i := range groups.NumField() {
		if group, ok := groups.Field(i).Interface().(checker); ok {
			errs = append(errs, group.Check())
		}
	}
	if least := c.Consumers.OrphanGrace + time.Minute; c.Stream.MaxAge < least {
		errs = append(errs, settings.Errorf("stream.max-age is %s, must be at least %s: consumers.orphan-grace and 1m",
			c.Stream.MaxAge, least))
	}
	if c.Latents.Wait >= c.Consumers.HandleTimeout {
		errs = append(errs, settings.Errorf("latents.wait is %s, must be below %s, which is consumers.handle-timeout",
			c.Latents.Wait, c.Consumers.HandleTimeout))
	}
	if c.Retention.Events < c.Stream.MaxAge {
		errs = append(errs, settings.Errorf("retention.events is %s, must be at least %s, which is stream.max-age",
			c.Retention.Events, c.Stream.MaxAge))
	}
	return errors.Join(errs...)
}

// checker is a group of settings with bounds.
type checker interface{ Check() error }

// CheckGroups checks each group of settings that a verb reads.
func CheckGroups(verb reflect.Value) error {
	if group, ok := verb.Interface().(checker); ok {
		return group.Check()
	}
	if verb.Kind() != reflect.Struct {
		return nil
	}
	var errs []error
	for i := range verb.NumField() {
		if verb.Type().Field(i).IsExported() {
			errs = append(errs, CheckGroups(verb.Field(i)))
		}
	}
	return errors.Join(errs...)
}

// DefaultConfig returns the configuration with every default in place.
func DefaultConfig() Config {
	var c struct {
		Config `embed:""`
	}
	parser, err := kong.New(&c)
	if err == nil {
		_, err = parser.Parse(nil)
	}
	if err != nil {
		panic(fmt.Sprintf("app: defaults: %v", err)) // a test calls this
	}
	return c.Config
}

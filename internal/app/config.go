package app

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/alecthomas/kong"
	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// Config is every setting there is. A setting's name is its path (nats.url): a nested key of the YAML file, with
// DECUWATCH_ before it an environment variable, and a flag of the verbs that need it. The tag help documents it, and
// docs/configuration.md is made from these tags.
type Config struct {
	NATS      NATSConfig      `embed:"" prefix:"nats." group:"NATS"`
	Stream    StreamConfig    `embed:"" prefix:"stream." group:"Stream of events"`
	Consumers ConsumersConfig `embed:"" prefix:"consumers." group:"Consumers"`
	Scoring   ScoringConfig   `embed:"" prefix:"scoring." group:"Scoring"`
	Postgres  PostgresConfig  `embed:"" prefix:"postgres." group:"Postgres"`
	Retention RetentionConfig `embed:"" prefix:"retention." group:"Retention"`
	Alerts    AlertsConfig    `embed:"" prefix:"alerts." group:"Alerts"`
	Volume    VolumeConfig    `embed:"" prefix:"volume." group:"Volume of alerts"`
	Patrol    PatrolConfig    `embed:"" prefix:"patrol." group:"Patrol"`
	Review    ReviewConfig    `embed:"" prefix:"review." group:"Review"`
	Metrics   MetricsConfig   `embed:"" prefix:"metrics." group:"Metrics and health"`
	Tracing   TracingConfig   `embed:"" prefix:"tracing." group:"Tracing"`
	Log       LogConfig       `kong:"-" prefix:"log." group:"Logging"` // a flag of every verb, in cli
}

// NATSConfig says how NATS is reached.
type NATSConfig struct {
	URL               string `name:"url" default:"nats://127.0.0.1:4222" help:"Addresses of the servers, separated by commas. Defaults to nats://127.0.0.1:4222."`
	Creds             string `name:"creds" placeholder:"FILE" help:"Credentials file (JWT and nkey) of the user. Defaults to none."`
	NKey              string `name:"nkey" placeholder:"FILE" help:"File with the seed of the user's nkey. Defaults to none."`
	CA                string `name:"ca" placeholder:"FILE" help:"PEM file of the authorities that the servers' certificates are checked against. Defaults to the system's."`
	Cert              string `name:"cert" placeholder:"FILE" help:"PEM file of the client's certificate, together with nats.key. Defaults to none."`
	Key               string `name:"key" placeholder:"FILE" help:"PEM file of the client certificate's key. Defaults to none."`
	TLSHandshakeFirst bool   `name:"tls-handshake-first" help:"Begin with the TLS handshake, as servers with handshake_first in their tls block require. Defaults to false."`
	InboxPrefix       string `name:"inbox-prefix" default:"_INBOX" help:"Subject below which replies are received; give each user its own where their permissions keep them apart. Defaults to _INBOX."`
}

func (c NATSConfig) Check() error {
	for address := range strings.SplitSeq(c.URL, ",") {
		u, err := url.Parse(strings.TrimSpace(address))
		if err != nil || u.Host == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) {
			return settings.Errorf("nats.url is %q, must name servers: nats://host:4222 or tls://host:4222", Redact(c.URL))
		}
	}
	switch {
	case (c.Cert == "") != (c.Key == ""):
		return settings.Errorf("nats.cert and nats.key must be given together")
	case c.Creds != "" && c.NKey != "":
		return settings.Errorf("nats.creds and nats.nkey must not both be given")
	}
	err := nats.CustomInboxPrefix(c.InboxPrefix)(&nats.Options{})
	if err != nil || strings.ContainsFunc(c.InboxPrefix, unicode.IsSpace) {
		return settings.Errorf("nats.inbox-prefix is %q, must be a subject without wildcards", c.InboxPrefix)
	}
	return nil
}

// Connect connects, and reconnects forever. The first connection must succeed unless wait is set.
func (c NATSConfig) Connect(name string, wait bool, log *slog.Logger) (*nats.Conn, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	opts := []nats.Option{
		nats.Name("decuwatch " + name), nats.MaxReconnects(-1), nats.ReconnectWait(500 * time.Millisecond), nats.Timeout(connectTimeout),
		nats.RetryOnFailedConnect(wait), nats.CustomInboxPrefix(c.InboxPrefix),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("connection to NATS is lost", "err", err)
			}
		}),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) {
			log.Warn("cannot connect to NATS, trying again", "nats", Redact(c.URL), "err", c.explain(err))
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) { log.Info("connected to NATS again", "server", nc.ConnectedUrlRedacted()) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("NATS reports an error", "err", err) }),
	}
	if c.Creds != "" {
		opts = append(opts, nats.UserCredentials(c.Creds))
	}
	if c.NKey != "" {
		nkey, err := nats.NkeyOptionFromSeed(c.NKey)
		if err != nil {
			return nil, fmt.Errorf("nats.nkey: %w", err)
		}
		opts = append(opts, nkey)
	}
	if c.CA != "" {
		opts = append(opts, nats.RootCAs(c.CA))
	}
	if c.Cert != "" {
		opts = append(opts, nats.ClientCert(c.Cert, c.Key))
	}
	if c.TLSHandshakeFirst {
		opts = append(opts, nats.TLSHandshakeFirst())
	}
	nc, err := nats.Connect(c.URL, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS at %s: %w", Redact(c.URL), c.explain(err))
	}
	return nc, nil
}

const connectTimeout = 5 * time.Second

// explain adds to an error of a connection what it most likely says about nats.tls-handshake-first.
func (c NATSConfig) explain(err error) error {
	var timeout net.Error
	var record tls.RecordHeaderError
	switch {
	case c.TLSHandshakeFirst && errors.As(err, &record):
		return fmt.Errorf("%w: the server does not begin with TLS (handshake_first is off there), but nats.tls-handshake-first is set", err)
	case !c.TLSHandshakeFirst && (errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, io.EOF)):
		return fmt.Errorf("%w: the server sent no greeting; one with handshake_first in its tls block needs nats.tls-handshake-first", err)
	}
	return err
}

// Redact returns addresses without user and password.
func Redact(urls string) string {
	list := strings.Split(urls, ",")
	for i, s := range list {
		if u, err := url.Parse(strings.TrimSpace(s)); err == nil && u.Host != "" {
			u.User = nil
			list[i] = u.String()
		}
	}
	return strings.Join(list, ",")
}

// StreamConfig is the stream of generation events. Where the stream exists, it stays as its operator made it.
type StreamConfig struct {
	Name     string        `name:"name" default:"GENERATION" help:"Name of the stream. Defaults to GENERATION."`
	MaxAge   time.Duration `name:"max-age" default:"168h" help:"How long a new stream keeps messages. Defaults to 168h."`
	MaxBytes int64         `name:"max-bytes" default:"8589934592" help:"How large a new stream may grow, in bytes, before publishing is refused. Defaults to 8589934592 (8 GiB)."`
	Replicas int           `name:"replicas" default:"1" help:"Replicas of a new stream; 3 where NATS is clustered. Defaults to 1."`

	KeepSettled   time.Duration `name:"keep-settled" default:"24h" help:"How long the stream keeps an event that has its verdict; it is purged earlier if the stream is more than 75% full. Defaults to 24h."`
	CheckInterval time.Duration `name:"check-interval" default:"10s" help:"Interval at which settings, backlog, orphaned events and the ledger are checked. Defaults to 10s."`
}

func (c StreamConfig) Check() error {
	return errors.Join(
		streamName("stream.name", c.Name),
		atLeast("stream", map[string]int64{"max-age": int64(c.MaxAge)}, int64(time.Minute)),
		atLeast("stream", map[string]int64{"keep-settled": int64(c.KeepSettled), "check-interval": int64(c.CheckInterval)}, int64(time.Second)),
		atLeast("stream", map[string]int64{"max-bytes": c.MaxBytes}, 1<<20),
		between("stream.replicas", int64(c.Replicas), 1, maxReplicas),
	)
}

// maxReplicas is what JetStream allows.
const maxReplicas = 5

// streamName returns an error if a name cannot be a stream's.
func streamName(setting, name string) error {
	if name == "" || strings.ContainsFunc(name, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune(`.*>/\`, r)
	}) {
		return settings.Errorf("%s is %q, must be the name of a stream, without spaces and . * > / \\", setting, name)
	}
	return nil
}

// ConsumersConfig says how events are taken from the stream.
type ConsumersConfig struct {
	AckWait       time.Duration `name:"ack-wait" default:"30s" help:"Silence of a worker after which its messages go to another. Defaults to 30s."`
	MaxDeliver    int           `name:"max-deliver" default:"5" help:"Failed attempts on one message before it becomes a dead letter; being stopped or killed is no failure. Defaults to 5."`
	MaxInFlight   int           `name:"max-in-flight" default:"256" help:"Messages of one model that a worker holds at once. Defaults to 256."`
	MaxRows       int           `name:"max-rows" default:"4096" help:"Rows of backbone work that are admitted at once, over all models. Defaults to 4096."`
	HandleTimeout time.Duration `name:"handle-timeout" default:"1m" help:"Deadline of one event, from its admission on. Defaults to 1m."`
	DrainTimeout  time.Duration `name:"drain-timeout" default:"20s" help:"How long a stop waits for events in flight; the rest goes back to the stream. Defaults to 20s."`
	RetryDelay    time.Duration `name:"retry-delay" default:"1s" help:"Delay before the second delivery; it doubles with each further one. Defaults to 1s."`
	RetryMaxDelay time.Duration `name:"retry-max-delay" default:"30s" help:"Longest delay between two deliveries. Defaults to 30s."`
	OrphanGrace   time.Duration `name:"orphan-grace" default:"24h" help:"How long an event waits while nobody pulls from its model's consumer; then it becomes a dead letter. Must be below the stream's maximum age. Defaults to 24h."`
}

func (c ConsumersConfig) Check() error {
	return errors.Join(
		atLeast("consumers", map[string]int64{"ack-wait": int64(c.AckWait)}, int64(100*time.Millisecond)),
		atLeast("consumers", map[string]int64{"orphan-grace": int64(c.OrphanGrace)}, int64(time.Minute)),
		atLeast("consumers", map[string]int64{
			"max-deliver": int64(c.MaxDeliver), "max-in-flight": int64(c.MaxInFlight), "max-rows": int64(c.MaxRows),
			"handle-timeout": int64(c.HandleTimeout), "drain-timeout": int64(c.DrainTimeout), "retry-delay": int64(c.RetryDelay),
		}, 1),
		atLeast("consumers", map[string]int64{"retry-max-delay": int64(c.RetryMaxDelay)}, int64(c.RetryDelay)),
	)
}

// ConsumersConfig returns the configuration of consumers.Run without its collaborators.
func (c Config) ConsumersConfig(models []string) consumers.Config {
	return consumers.Config{
		Models: models, Stream: c.Stream.Name, MaxAge: c.Stream.MaxAge, MaxBytes: c.Stream.MaxBytes, Replicas: c.Stream.Replicas,
		AckWait: c.Consumers.AckWait, MaxDeliver: c.Consumers.MaxDeliver, MaxInFlight: c.Consumers.MaxInFlight, MaxRows: c.Consumers.MaxRows,
		HandleTimeout: c.Consumers.HandleTimeout, DrainTimeout: c.Consumers.DrainTimeout, RetryDelay: c.Consumers.RetryDelay, RetryMaxDelay: c.Consumers.RetryMaxDelay,
		OrphanGrace: c.Consumers.OrphanGrace, CheckInterval: c.Stream.CheckInterval, KeepSettled: c.Stream.KeepSettled,
	}
}

// ScoringConfig says which ensembles score, and how.
type ScoringConfig struct {
	Ensembles      []string `name:"ensembles" short:"e" placeholder:"PATH" help:"Ensembles that score, one for each production model: directories, or manifests. Required."`
	Library        string   `name:"library" placeholder:"FILE" help:"ONNX Runtime's shared library. Defaults to ONNXRUNTIME_LIB, else .tools/onnxruntime-1.27.0/libonnxruntime.so.1 in the working directory or above it, else beside the program, else the system's."`
	Device         string   `name:"device" default:"cpu" help:"cpu, cuda:N or tensorrt:N. Defaults to cpu."`
	Threads        int      `name:"threads" default:"0" help:"Threads of a session within an operator; 0 shares the CPUs among the sessions. Defaults to 0."`
	Sessions       int      `name:"sessions" default:"1" help:"Sessions of the backbone that run side by side. Defaults to 1."`
	MaxBatchRows   int      `name:"max-batch-rows" default:"0" help:"Rows of one run of the backbone, at most; 0 is 64 on cpu, 256 on a GPU. Defaults to 0."`
	MaxRequestRows int      `name:"max-request-rows" default:"20000" help:"Rows of one request, at most. Defaults to 20000."`
	MemoryLimit    int64    `name:"memory-limit" default:"0" help:"GPU memory of a session in bytes, at most; 0 is no bound. Defaults to 0."`
	Spinning       bool     `name:"spinning" help:"Let the threads of a session spin between operators: faster where nothing else needs the CPUs. Defaults to false."`
	Profile        string   `name:"profile" default:"fixed" help:"fixed scores every event with the ensemble's own settings, so that scores compare; as-requested with the event's. Defaults to fixed."`
	Unreproducible string   `name:"unreproducible" default:"score" help:"What becomes of an event that cannot be rerun as its producer ran it: score (the receipt says what was replaced) or skip (recorded with the reason). Defaults to score."`
}

// Values of scoring.unreproducible.
const (
	unreproducibleScore = "score"
	unreproducibleSkip  = "skip"
)

func (c ScoringConfig) Check() error {
	switch {
	case len(c.Ensembles) == 0:
		return settings.Errorf("scoring.ensembles is empty, must name at least one ensemble directory: -e ensembles/fashion-mnist")
	case c.Profile != scoring.ProfileFixed && c.Profile != scoring.ProfileAsRequested:
		return settings.Errorf("scoring.profile is %q, must be %s or %s", c.Profile, scoring.ProfileFixed, scoring.ProfileAsRequested)
	case c.Unreproducible != unreproducibleScore && c.Unreproducible != unreproducibleSkip:
		return settings.Errorf("scoring.unreproducible is %q, must be %s or %s", c.Unreproducible, unreproducibleScore, unreproducibleSkip)
	}
	return errors.Join(
		device(c.Device),
		atLeast("scoring", map[string]int64{
			"threads": int64(c.Threads), "max-batch-rows": int64(c.MaxBatchRows), "memory-limit": c.MemoryLimit,
		}, 0),
		atLeast("scoring", map[string]int64{
			"sessions": int64(c.Sessions), "max-request-rows": int64(c.MaxRequestRows),
		}, 1),
	)
}

var devicePattern = regexp.MustCompile(`^(cpu|(cuda|tensorrt):[0-9]{1,4})$`)

func device(name string) error {
	if !devicePattern.MatchString(name) {
		return settings.Errorf("scoring.device is %q, must be cpu, cuda:N or tensorrt:N", name)
	}
	return nil
}

// options returns the options of the engine of one ensemble.
func (c ScoringConfig) options(path string, log *slog.Logger) scoring.Options {
	return scoring.Options{
		Ensemble: path, Library: c.Library, Device: c.Device, Threads: c.Threads, Sessions: c.Sessions, MaxBatchRows: c.MaxBatchRows,
		MaxRequestRows: c.MaxRequestRows, MemoryLimit: c.MemoryLimit, Spinning: c.Spinning, Log: log,
	}
}

// PostgresConfig says how Postgres is reached.
type PostgresConfig struct {
	URL              string        `name:"url" default:"postgres://127.0.0.1:5432/decuwatch" help:"Address of the database: postgres://user@host:5432/name. Parameters as in libpq: sslmode=verify-full, sslrootcert=FILE, passfile=FILE. Defaults to postgres://127.0.0.1:5432/decuwatch."`
	MaxConns         int           `name:"max-conns" default:"8" help:"Connections, at most. Defaults to 8."`
	Committers       int           `name:"committers" default:"2" help:"Transactions that write verdicts at a time. Defaults to 2."`
	BatchSize        int           `name:"batch-size" default:"256" help:"Verdicts in one transaction, at most. Defaults to 256."`
	CommitTimeout    time.Duration `name:"commit-timeout" default:"10s" help:"Longest time of a transaction that writes verdicts. Defaults to 10s."`
	StatementTimeout time.Duration `name:"statement-timeout" default:"30s" help:"Longest time of any other statement. Defaults to 30s."`
	LockTimeout      time.Duration `name:"lock-timeout" default:"5s" help:"Longest wait for a lock. Defaults to 5s."`
	Migrate          bool          `name:"migrate" help:"Let serve create and upgrade the tables at its start; its database user needs the right to. Defaults to false."`
}

func (c PostgresConfig) Check() error {
	// pgx takes "" for the settings of libpq's own environment variables.
	if _, err := pgx.ParseConfig(c.URL); err != nil || c.URL == "" {
		return settings.Errorf("postgres.url is not an address: postgres://user@host:5432/name")
	}
	if err := atLeast("postgres", map[string]int64{"max-conns": int64(c.MaxConns), "committers": int64(c.Committers), "batch-size": int64(c.BatchSize)}, 1); err != nil {
		return err
	}
	return atLeast("postgres", map[string]int64{"commit-timeout": int64(c.CommitTimeout), "statement-timeout": int64(c.StatementTimeout), "lock-timeout": int64(c.LockTimeout)}, int64(time.Millisecond))
}

// Config returns the configuration of a store.
func (c PostgresConfig) Config(log *slog.Logger, sinks ...string) postgres.Config {
	return postgres.Config{
		URL: c.URL, MaxConns: c.MaxConns, Committers: c.Committers, BatchSize: c.BatchSize, CommitTimeout: c.CommitTimeout,
		StatementTimeout: c.StatementTimeout, LockTimeout: c.LockTimeout, Sinks: sinks, Log: log,
	}
}

// RetentionConfig says how long what is kept in Postgres.
type RetentionConfig struct {
	Scores          time.Duration `name:"scores" default:"9600h" help:"How long scores are kept, by whole months, at least 720h (30 days); older events are refused. Defaults to 9600h (400 days)."`
	Alerts          time.Duration `name:"alerts" default:"19200h" help:"How long alerts and their reviews are kept, at least 720h. Defaults to 19200h (800 days)."`
	Events          time.Duration `name:"events" default:"9600h" help:"How long the ledger, skips and dead letters are kept, at least 720h; longer than the stream keeps messages. Defaults to 9600h (400 days)."`
	Payloads        time.Duration `name:"payloads" default:"720h" help:"How long payloads of dead letters that are the producer's fault are kept, at least 24h; the rest of the row stays. Defaults to 720h (30 days)."`
	Evidence        time.Duration `name:"evidence" default:"2160h" help:"How long images of reviews are kept, at least 1h. Defaults to 2160h (90 days)."`
	PartitionsAhead int           `name:"partitions-ahead" default:"2" help:"Months for which partitions of scores exist in advance, 1 to 12. Defaults to 2."`
}

// Check checks what the database would refuse.
func (c RetentionConfig) Check() error {
	if c.PartitionsAhead < 1 || c.PartitionsAhead > 12 {
		return settings.Errorf("retention.partitions-ahead is %d, must be 1 to 12", c.PartitionsAhead)
	}
	m := Config{Retention: c}.maintenance()
	m.Deliveries, m.Rollups = m.WithDefaults().Deliveries, m.WithDefaults().Rollups // which have no settings
	for _, r := range m.Retentions() {
		if r.Keep < r.Least {
			return settings.Errorf("retention.%s is %s, must be at least %s", r.Kind, r.Keep, r.Least)
		}
	}
	return nil
}

func (c Config) maintenance() postgres.Maintenance {
	r := c.Retention
	return postgres.Maintenance{Ahead: r.PartitionsAhead, Scores: r.Scores, Alerts: r.Alerts, Events: r.Events, Payloads: r.Payloads, Evidence: r.Evidence}
}

// AlertsConfig is the stream of alerts. Where the stream exists, it stays as its operator made it.
type AlertsConfig struct {
	Stream   string        `name:"stream" default:"UNCERTAINTY" help:"Name of the stream that alerts are published to. Defaults to UNCERTAINTY."`
	MaxAge   time.Duration `name:"max-age" default:"720h" help:"How long a new stream keeps alerts. Defaults to 720h."`
	MaxBytes int64         `name:"max-bytes" default:"4294967296" help:"How large a new stream may grow, in bytes. Defaults to 4294967296 (4 GiB)."`
	Replicas int           `name:"replicas" default:"1" help:"Replicas of a new stream; 3 where NATS is clustered. Defaults to 1."`

	WebhookURL        string `name:"webhook-url" placeholder:"URL" help:"Each alert is posted here too. Defaults to none."`
	WebhookSecretFile string `name:"webhook-secret-file" placeholder:"FILE" help:"File with the key that signs what is posted (Standard Webhooks: base64 of at least 24 bytes). Defaults to none: not signed."`
	WebhookFormat     string `name:"webhook-format" default:"cloudevents" help:"cloudevents, or slack for receivers that take a line of text. Defaults to cloudevents."`
	AlertmanagerURL   string `name:"alertmanager-url" placeholder:"URL" help:"Prometheus Alertmanager that each alert is sent to too, without /api/v2. Defaults to none."`
	Link              string `name:"link" placeholder:"URL" help:"Begins the link to an alert's review page in webhooks and Alertmanager; the alert's id follows. Defaults to review.url with /review/ where that is given, else to none."`
}

func (c AlertsConfig) Check() error {
	if c.WebhookFormat != alerts.FormatCloudEvents && c.WebhookFormat != alerts.FormatSlack {
		return settings.Errorf("alerts.webhook-format is %q, must be %s or %s", c.WebhookFormat,
			alerts.FormatCloudEvents, alerts.FormatSlack)
	}
	if c.WebhookSecretFile != "" && c.WebhookURL == "" {
		return settings.Errorf("alerts.webhook-secret-file is given without alerts.webhook-url")
	}
	return errors.Join(
		streamName("alerts.stream", c.Stream),
		atLeast("alerts", map[string]int64{"max-age": int64(c.MaxAge)}, int64(time.Minute)),
		atLeast("alerts", map[string]int64{"max-bytes": c.MaxBytes}, 1<<20),
		between("alerts.replicas", int64(c.Replicas), 1, maxReplicas),
		webAddress("alerts.webhook-url", c.WebhookURL), webAddress("alerts.alertmanager-url", c.AlertmanagerURL),
		webAddress("alerts.link", c.Link),
	)
}

// webAddress returns an error if an address is given that is not an HTTP address.
func webAddress(setting, address string) error {
	if address == "" {
		return nil
	}
	if u, err := url.Parse(address); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return settings.Errorf("%s is %q, must be http://host or https://host", setting, Redact(address))
	}
	return nil
}

// Sinks returns the sinks of alerts, the stream first.
func (c AlertsConfig) Sinks(js jetstream.JetStream) (*alerts.StreamSink, []alerts.Sink, error) {
	stream := alerts.NewStreamSink(js, c.streamConfig())
	sinks := []alerts.Sink{stream}
	if c.WebhookURL != "" {
		cfg := alerts.WebhookConfig{URL: c.WebhookURL, Format: c.WebhookFormat, Link: c.Link}
		if c.WebhookSecretFile != "" {
			secret, err := os.ReadFile(c.WebhookSecretFile)
			if err != nil {
				return nil, nil, fmt.Errorf("alerts.webhook-secret-file: %w", err)
			}
			cfg.Secret = strings.TrimSpace(string(secret))
		}
		sink, err := alerts.NewWebhook(cfg)
		if err != nil {
			return nil, nil, settings.Errorf("alerts.webhook-url: %w", err)
		}
		sinks = append(sinks, sink)
	}
	if c.AlertmanagerURL != "" {
		sink, err := alerts.NewAlertmanager(alerts.AlertmanagerConfig{URL: c.AlertmanagerURL, Link: c.Link})
		if err != nil {
			return nil, nil, settings.Errorf("alerts.alertmanager-url: %w", err)
		}
		sinks = append(sinks, sink)
	}
	return stream, sinks, nil
}

func (c AlertsConfig) streamConfig() alerts.StreamConfig {
	return alerts.StreamConfig{Name: c.Stream, MaxAge: c.MaxAge, MaxBytes: c.MaxBytes, Replicas: c.Replicas}
}

// MetricsConfig is the mux of metrics, health and profiles.
type MetricsConfig struct {
	Address string `name:"address" default:"127.0.0.1:9464" help:"Address of /metrics, /healthz and /readyz; port 0 is any free one. It has no authentication: keep it on a network of your own. Defaults to 127.0.0.1:9464."`
	Pprof   bool   `name:"pprof" help:"Serve Go's profiles below /debug/pprof/. Defaults to false."`
	HTTPTLSConfig
	ClockTolerance time.Duration `name:"clock-tolerance" default:"30s" help:"How far the worker's clock may be from Postgres' and JetStream's; beyond it the worker is not ready. Defaults to 30s."`
	MaxClassSeries int           `name:"max-class-series" default:"100" help:"Classes of a model, at most, for each to have a score histogram of its own; with more they share one. Defaults to 100."`
}

func (c MetricsConfig) Check() error {
	return errors.Join(
		hostPort("metrics.address", c.Address), c.pair("metrics"),
		atLeast("metrics", map[string]int64{"max-class-series": int64(c.MaxClassSeries)}, 1),
		atLeast("metrics", map[string]int64{"clock-tolerance": int64(c.ClockTolerance)}, int64(time.Second)),
	)
}

func hostPort(setting, address string) error {
	_, port, err := net.SplitHostPort(address)
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n > math.MaxUint16 {
		return settings.Errorf("%s is %q, must be host:port", setting, address)
	}
	return nil
}

// HTTPTLSConfig says how an HTTP server proves who it is.
type HTTPTLSConfig struct {
	TLSCert string `name:"tls-cert" placeholder:"FILE" help:"PEM file with the certificate that is served, and its chain; read again when it changes. Defaults to none: plain HTTP."`
	TLSKey  string `name:"tls-key" placeholder:"FILE" help:"PEM file with the certificate's private key. Defaults to none."`
}

// TracingConfig says where spans go.
type TracingConfig struct {
	Endpoint    string  `name:"endpoint" placeholder:"URL" help:"OTLP/HTTP endpoint that spans are sent to, without /v1/traces: http://127.0.0.1:4318. Defaults to none: no spans."`
	SampleRatio float64 `name:"sample-ratio" default:"1" help:"Share of the traces begun here that are sampled, 0 to 1; a trace that a producer began keeps its producer's decision. Defaults to 1."`
}

func (c TracingConfig) Check() error {
	return errors.Join(webAddress("tracing.endpoint", c.Endpoint), share("tracing.sample-ratio", c.SampleRatio))
}

// share returns an error if v is not a share of a whole.
func share(setting string, v float64) error {
	if !(v >= 0 && v <= 1) {
		return settings.Errorf("%s is %g, must be 0 to 1", setting, v)
	}
	return nil
}

// LogConfig says what is logged, to stderr.
type LogConfig struct {
	Level  string `name:"level" default:"info" help:"debug, info, warn or error. Defaults to info."`
	Format string `name:"format" default:"text" help:"text or json. Defaults to text."`
}

func (c LogConfig) Logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		return nil, settings.Errorf("log.level is %q, must be debug, info, warn or error", c.Level)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch c.Format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, settings.Errorf("log.format is %q, must be text or json", c.Format)
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
	least := int64(c.Consumers.OrphanGrace + time.Minute)
	errs = append(errs, atLeast("stream", map[string]int64{"max-age": int64(c.Stream.MaxAge)}, least))
	if c.Retention.Events < c.Stream.MaxAge {
		errs = append(errs, settings.Errorf("retention.events is %s, must be at least %s, which is stream.max-age",
			c.Retention.Events, c.Stream.MaxAge))
	}
	return errors.Join(errs...)
}

// checker is a group of settings with bounds.
type checker interface{ Check() error }

// CheckGroups validates each group of settings that a verb reads.
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

// durations are the settings that atLeast prints as durations.
var durations = []string{"max-age", "keep-settled", "check-interval", "orphan-grace", "ack-wait", "handle-timeout", "drain-timeout", "retry-delay", "retry-max-delay", "events", "scores", "alerts", "evidence", "clock-tolerance", "commit-timeout", "statement-timeout", "lock-timeout"}

// atLeast returns an error that names the first setting, in order of name, that is below the least.
func atLeast(group string, values map[string]int64, least int64) error {
	names := make([]string, 0, len(values))
	for name := range values {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		v := values[name]
		if v >= least {
			continue
		}
		if slices.Contains(durations, name) {
			return settings.Errorf("%s.%s is %s, must be at least %s", group, name, time.Duration(v), time.Duration(least))
		}
		return settings.Errorf("%s.%s is %d, must be at least %d", group, name, v, least)
	}
	return nil
}

func between(setting string, v, least, most int64) error {
	if v < least || v > most {
		return settings.Errorf("%s is %d, must be %d to %d", setting, v, least, most)
	}
	return nil
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
		panic(fmt.Sprintf("the defaults of the configuration do not fit: %v", err)) // a test calls this
	}
	return c.Config
}

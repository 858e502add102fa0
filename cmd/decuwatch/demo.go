package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor/reconcile"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type demoCmd struct {
	Dir        string        `default:".decuwatch" placeholder:"DIR" help:"Where the servers keep their data; a second run uses it again."`
	Requests   int           `default:"200" help:"Generation requests to publish."`
	Ensemble   string        `default:"ensembles/fashion-mnist" placeholder:"PATH" help:"Ensemble that scores."`
	Stay       string        `default:"auto" enum:"auto,yes,no" help:"Stay up after the summary until Ctrl-C: yes, no, or auto, which is yes on a terminal."`
	Timeout    time.Duration `default:"10m" help:"Longest time until every request has its verdict."`
	NATSPort   int           `name:"nats-port" default:"4222" help:"Port of the NATS server where it is free, else any; 0 is any."`
	HTTPPort   int           `name:"metrics-port" default:"9464" help:"Port of metrics and health where it is free, else any; 0 is any."`
	ReviewPort int           `default:"8080" help:"Port of the review page where it is free, else any; 0 is any."`
	Library    string        `name:"scoring.library" placeholder:"FILE" help:"ONNX Runtime's shared library. Defaults to where serve finds it."`
}

func (demoCmd) Help() string {
	return `Starts a NATS server with JetStream and a Postgres of its own below --dir, migrates, serves, publishes real generation requests over all classes and noise seeds, and prints what became of them. On a terminal everything stays up until Ctrl-C, for you to look around; otherwise it ends once both sides reconcile.

Examples:

  decuwatch demo
  decuwatch demo --requests 1000 --stay no`
}

// demoSource is the source of the demo's events.
const demoSource = "/decuwatch/demo"

// Run shows the monitor end to end.
func (c *demoCmd) Run(ctx context.Context, s *streams) (err error) {
	if c.Requests < 1 || c.Requests > 1_000_000 {
		return usage("--requests is %d, must be 1 to 1000000", c.Requests)
	}
	began := time.Now()
	say := func(what, format string, args ...any) {
		fmt.Fprintf(s.out, "%s  %-10s %s\n", dim(s, fmt.Sprintf("%5.1fs", time.Since(began).Seconds())), what, fmt.Sprintf(format, args...))
	}
	dir, unlock, err := c.prepare()
	if err != nil {
		return err
	}
	defer unlock()
	logFile, err := os.OpenFile(filepath.Join(dir, "decuwatch.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644) //nolint:gosec // a log that the user may read
	if err != nil {
		return err
	}
	defer logFile.Close() //nolint:errcheck // a lost line is no reason to fail
	log := slog.New(slog.NewTextHandler(logFile, nil))
	slog.SetDefault(log)
	life, ctx := app.NewLifecycle(ctx, log)
	defer life.End(&err)

	e, err := ensemble.Open(c.Ensemble)
	if err != nil {
		return err
	}
	say("ensemble", "%s, %d components, %d classes, %s", e.Name, e.Components, len(e.Classes), e.Digest[:12])

	broker, err := startNATS(filepath.Join(dir, "nats"), c.NATSPort)
	if err != nil {
		return err
	}
	life.OnStop("nats-server", func() error { broker.Shutdown(); broker.WaitForShutdown(); return nil })
	say("NATS", "%s, JetStream on disk", broker.ClientURL())

	database, err := local.Start(ctx, local.Options{Dir: filepath.Join(dir, "postgres")})
	if err != nil {
		return err
	}
	life.OnStop("postgres", database.Stop)
	if err := postgres.Migrate(ctx, database.URL()); err != nil {
		return err
	}
	say("Postgres", "%s, migrated", database.Address())

	cfg := app.DefaultConfig()
	cfg.NATS.URL, cfg.Postgres.URL, cfg.Metrics.Address = broker.ClientURL(), database.URL(), loopback(freePort(c.HTTPPort))
	cfg.Review.Address = loopback(freePort(c.ReviewPort))
	cfg.Scoring.Ensembles, cfg.Scoring.Library = []string{c.Ensemble}, c.Library
	store, err := cfg.Postgres.Open(ctx, log)
	if err != nil {
		return err
	}
	life.OnStop("store", func() error { store.Close(); return nil })
	note, err := referenceThresholds(ctx, store, e)
	if err != nil {
		return err
	}
	say("thresholds", "%s", note)

	served := make(chan app.Serving, 1)
	life.Run("serve", func(ctx context.Context) error {
		version, revision := built()
		return app.Serve(ctx, cfg, app.Options{
			Log: log, Version: version, Revision: revision, Started: func(s app.Serving) { served <- s },
		})
	})
	var up app.Serving
	select {
	case up = <-served:
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), fmt.Errorf("see %s", logFile.Name()))
	}
	say("monitor", "serving, http://%s/metrics", up.Metrics)
	say("review", "http://%s/", up.Review)

	nc, err := cfg.NATS.Connect("demo", false, log)
	if err != nil {
		return err
	}
	life.OnStop("connection", func() error { nc.Close(); return nil })
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	fmt.Fprintln(s.out)
	events, took, err := c.requests(ctx, js, store, e, s)
	if err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	if err := owesNothing(ctx, store); err != nil {
		return err
	}
	if err := c.summary(ctx, s, store, e, events, took); err != nil {
		return err
	}
	r, err := reconcile.Run(ctx, reconcile.Options{JetStream: js, Store: store, Events: cfg.Stream.Name, Alerts: cfg.Alerts.Stream})
	if err != nil {
		return err
	}
	fmt.Fprintf(s.out, "\nReconciled: %d messages in the stream = %d scores + %d skips + %d dead letters + %d repeats; %d alerts in Postgres, %d published, %d held back.\n",
		r.Messages, r.Scores, r.Skips, r.DeadLetters, r.Repeats, r.Alerts, r.Published, r.HeldBack)
	if !r.Agrees() || r.Waiting > 0 {
		return fmt.Errorf("the stream and Postgres do not agree: %+v", *r)
	}
	c.addresses(s, e, broker, database, up, logFile.Name())
	if c.Stay == "no" || c.Stay == "auto" && !s.terminal {
		fmt.Fprintf(s.out, "\nEverything stops now. On a terminal, or with --stay yes, it stays up; the next run goes on with the same data.\n")
		return nil
	}
	fmt.Fprintf(s.out, "\nEverything stays up, and alerts appear below as they come. Ctrl-C ends it.\n\n")
	watch := &watchCmd{NATS: cfg.NATS, Alerts: cfg.Alerts, quiet: true}
	return watch.Run(ctx, s, log)
}

// prepare makes the directory and takes it for this process.
func (c *demoCmd) prepare() (dir string, unlock func(), err error) {
	if dir, err = filepath.Abs(c.Dir); err != nil {
		return "", nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // Postgres' user must pass through
		return "", nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644) //nolint:gosec // empty
	if err != nil {
		return "", nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil { //nolint:gosec // a file descriptor is small
		_ = lock.Close()
		return "", nil, fmt.Errorf("another demo runs in %s: end it, or choose another --dir", dir)
	}
	return dir, func() { _ = lock.Close() }, nil
}

// startNATS starts a server within this process that keeps its streams in dir and flushes each write to disk.
func startNATS(dir string, port int) (*server.Server, error) {
	if port = freePort(port); port == 0 {
		port = server.RANDOM_PORT
	}
	s, err := server.NewServer(&server.Options{
		ServerName: "decuwatch-demo", Host: "127.0.0.1", Port: port, JetStream: true, StoreDir: dir, SyncAlways: true, NoLog: true, NoSigs: true,
	})
	if err != nil {
		return nil, fmt.Errorf("start nats-server: %w", err)
	}
	s.Start()
	if !s.ReadyForConnections(30 * time.Second) {
		s.Shutdown()
		return nil, errors.New("start nats-server: not ready after 30s")
	}
	return s, nil
}

// loopback returns the address of a port on this machine alone.
func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// freePort returns the port where it is free, else 0, which means any.
func freePort(port int) int {
	l, err := net.Listen("tcp", loopback(port))
	if err != nil {
		return 0
	}
	_ = l.Close()
	return port
}

// Quantiles of the reference that become the demo's thresholds.
var referenceQuantiles = []struct {
	quantile float64
	severity schema.Severity
}{{0.99, schema.SeverityWarn}, {0.999, schema.SeverityCritical}}

// referenceThresholds sets the model's first thresholds from the ensemble's reference, the scores of its well-sampled classes,
// unless it has thresholds. It says what it did.
func referenceThresholds(ctx context.Context, store *postgres.Store, e *ensemble.Ensemble) (string, error) {
	list, err := store.Thresholds(ctx)
	if err != nil {
		return "", err
	}
	series := seriesOf(e)
	own := slices.DeleteFunc(list, func(t schema.Threshold) bool { return t.Series() != series })
	if len(own) > 0 {
		return fmt.Sprintf("%d, as they stood", len(own)), nil
	}
	change := postgres.ThresholdChange{Kind: postgres.ChangeReference, SetBy: "demo", Reason: "quantiles of the ensemble's reference scores"}
	var said []string
	for _, measurement := range schema.MeasurementNames() {
		reference, ok := e.Reference[string(measurement)]
		if !ok {
			continue
		}
		for _, q := range referenceQuantiles {
			value, ok := reference.Quantiles[strconv.FormatFloat(q.quantile, 'g', -1, 64)]
			if !ok {
				continue
			}
			alpha := math.Round((1-q.quantile)*1e6) / 1e6
			change.Thresholds = append(change.Thresholds, schema.Threshold{
				Model: e.Name, EnsembleDigest: e.Digest, Settings: series.Settings, Measurement: measurement, Scope: schema.ScopeModel,
				Severity: q.severity, Value: value, Origin: "reference", N: reference.N, Alpha: &alpha, SetBy: change.SetBy, Reason: change.Reason,
			})
			said = append(said, fmt.Sprintf("%s %s from %.4g", measurement, q.severity, value))
		}
	}
	if len(change.Thresholds) == 0 {
		return "none: the ensemble brings no reference scores, so nothing raises an alert (decuwatch thresholds set)", nil
	}
	if _, err := store.SetThresholds(ctx, change); err != nil {
		return "", err
	}
	return strings.Join(said, ", "), nil
}

// published is one event of the demo with the digest of its message.
type published struct {
	event  schema.Event
	digest string
}

// requests publishes the demo's requests and waits for their verdicts.
func (c *demoCmd) requests(ctx context.Context, js jetstream.JetStream, store *postgres.Store, e *ensemble.Ensemble, s *streams) ([]published, time.Duration, error) {
	stream, err := consumers.EnsureStream(ctx, js, consumers.StreamConfig{})
	if err != nil {
		return nil, 0, err
	}
	before := stream.CachedInfo().State.LastSeq
	events := make([]schema.Event, c.Requests)
	list := make([]published, c.Requests)
	for i := range events {
		tenant := []string{"acme", "globex", "initech"}[i%3]
		events[i] = schema.Event{
			Source: demoSource, ID: uuid.Must(uuid.NewV7()).String(), Time: time.Now().UTC().Truncate(time.Microsecond),
			Data: schema.Generation{
				Model: e.Name, Class: schema.ClassLabel(e.Classes[i%len(e.Classes)].Label), Seed: before + uint64(i) + 1, Noise: e.Noise, //nolint:gosec // small
				Sampler: &schema.Sampler{Name: "ddim", Steps: e.Profile.Steps, GuidanceScale: e.Profile.GuidanceScale, Eta: e.Profile.Eta},
				Labels:  map[string]string{"tenant": tenant},
			},
		}
		header, payload, err := schema.Encode(events[i])
		if err != nil {
			return nil, 0, err
		}
		list[i] = published{events[i], schema.Digest(header, payload)}
	}
	began := time.Now()
	if _, _, err := publishAll(ctx, js, events, 64, s); err != nil {
		return nil, 0, err
	}
	if !s.progress {
		fmt.Fprintf(s.out, "published  %d requests over %d classes, every one with a seed of its own\n", len(events), len(e.Classes))
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return nil, 0, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.Timeout, fmt.Errorf("not every request has its verdict after %s", c.Timeout))
	defer cancel()
	bar := progress(s, c.Requests, "scoring")
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		verdicts, err := store.VerdictsBySequence(ctx, stream.CachedInfo().Config.Name, before+1, info.State.LastSeq)
		if err != nil {
			return nil, 0, errors.Join(context.Cause(ctx), err)
		}
		_ = bar.Set(min(len(verdicts), c.Requests)) // it only draws
		if len(verdicts) >= c.Requests {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, 0, context.Cause(ctx)
		}
	}
	_ = bar.Exit()
	took := time.Since(began)
	if !s.progress {
		fmt.Fprintf(s.out, "scored     %d requests in %.1f s\n", len(events), took.Seconds())
	}
	return list, took, nil
}

// owesNothing waits until every alert has reached the stream.
func owesNothing(ctx context.Context, store *postgres.Store) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("alerts are still in the outbox after 1m"))
	defer cancel()
	for {
		stats, err := store.OutboxStats(ctx)
		if err != nil {
			return errors.Join(context.Cause(ctx), err)
		}
		if !slices.ContainsFunc(stats, func(s schema.OutboxStats) bool { return s.Pending > 0 }) {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// classSummary is what became of the requests of one class.
type classSummary struct {
	requests, alerts int
	gap, risk        float64 // sums
}

// summary prints the table by class and the last alerts.
func (c *demoCmd) summary(ctx context.Context, s *streams, store *postgres.Store, e *ensemble.Ensemble, events []published, took time.Duration) error {
	classes := make([]classSummary, len(e.Classes))
	rows, alerted := 0, 0
	for _, p := range events {
		recorded, found, err := store.Lookup(ctx, p.event.Identity(), p.digest)
		if err != nil {
			return err
		}
		if !found || recorded.Score == nil {
			return fmt.Errorf("request %s was not scored: %s %s", p.event.ID, recorded.Outcome, recorded.Reason)
		}
		class := &classes[recorded.Score.ClassIndex]
		class.requests++
		class.gap += recorded.Score.ClassGap.Value
		class.risk += recorded.Score.RequestRisk.Value
		rows += recorded.Score.Receipt.Rows
		if len(recorded.AlertIDs) > 0 {
			class.alerts++
			alerted++
		}
	}
	thresholds, err := store.Thresholds(ctx)
	if err != nil {
		return err
	}
	table, err := alerts.NewTable(thresholds)
	if err != nil {
		return err
	}
	bound := func(measurement schema.MeasurementName, class int) float64 { // the least that raises an alert
		lowest := math.NaN()
		for _, t := range table.Applicable(seriesOf(e), measurement, class).All() {
			if !(t.Value >= lowest) {
				lowest = t.Value
			}
		}
		return lowest
	}
	highest := 0.0
	order := make([]int, 0, len(classes))
	for i, class := range classes {
		if class.requests > 0 {
			order = append(order, i)
			highest = max(highest, class.gap/float64(class.requests))
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		ga, gb := classes[a].gap/float64(classes[a].requests), classes[b].gap/float64(classes[b].requests)
		switch {
		case ga > gb:
			return -1
		case ga < gb:
			return 1
		}
		return 0
	})
	fmt.Fprintf(s.out, "\n%d requests in %.1f s: %.0f requests/s, %.0f rows of U-Net work/s; %d raised an alert\n\n", len(events), took.Seconds(),
		float64(len(events))/took.Seconds(), float64(rows)/took.Seconds(), alerted)
	const width = 24
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "class\ttraining images\trequests\tmean PaiDE\tthreshold\tmean request risk\tthreshold\talerts\t  \n")
	for _, i := range order {
		class := classes[i]
		n := float64(class.requests)
		bar := strings.Repeat("█", max(1, int(math.Round(class.gap/n/highest*width))))
		fmt.Fprintf(w, "%s\t%s\t%d\t%.4f\t%s\t%.4f\t%s\t%d\t  %s\n", printable(e.Classes[i].Label), imageCount(e.Classes[i].Images), class.requests,
			class.gap/n, number(bound(schema.ClassGap, i)), class.risk/n, number(bound(schema.RequestRisk, i)), class.alerts, bar+strings.Repeat(" ", width-len([]rune(bar))))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	last, err := store.Alerts(ctx, postgres.AlertFilter{Model: e.Name, Limit: 5})
	if err != nil {
		return err
	}
	if len(last) > 0 {
		fmt.Fprintf(s.out, "\nThe last alerts:\n")
	}
	slices.Reverse(last)
	for _, a := range last {
		printAlert(s.out, a, s.terminal)
	}
	return nil
}

// seriesOf returns the series of the scores that an ensemble makes with its fixed profile.
func seriesOf(e *ensemble.Ensemble) schema.Series {
	return schema.Series{Model: e.Name, EnsembleDigest: e.Digest, Settings: e.Profile.Settings()}
}

// number returns a number, or a dash for NaN.
func number(v float64) string {
	if math.IsNaN(v) {
		return "-"
	}
	return fmt.Sprintf("%.4f", v)
}

// addresses prints where everything is, and what to try next.
func (c *demoCmd) addresses(s *streams, e *ensemble.Ensemble, broker *server.Server, database *local.Server, up app.Serving, log string) {
	program := "decuwatch"
	if exe, err := os.Executable(); err == nil {
		program = exe
		if wd, err := os.Getwd(); err == nil {
			if relative, err := filepath.Rel(wd, exe); err == nil && !strings.HasPrefix(relative, "..") {
				program = relative
			}
		}
	}
	query := `SELECT class_label, count(*), round(avg(class_gap)::numeric, 4) AS class_gap FROM decuwatch_views.scores GROUP BY 1 ORDER BY 3 DESC`
	fmt.Fprintf(s.out, "\n")
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "NATS\t%s\n", broker.ClientURL())
	fmt.Fprintf(w, "metrics\thttp://%s/metrics, /healthz, /readyz\n", up.Metrics)
	if up.Review != "" {
		fmt.Fprintf(w, "review\thttp://%s/\n", up.Review)
	}
	fmt.Fprintf(w, "Postgres\t%s\n", settings.Redact(database.URL()))
	fmt.Fprintf(w, "log\t%s\n", log)
	_ = w.Flush() // to the same place as everything else
	fmt.Fprintf(s.out, "\nAsk the database:\n  psql '%s' -c '%s'\n", database.URL(), query)
	nats := ""
	if u, err := url.Parse(broker.ClientURL()); err == nil && u.Port() != "4222" {
		nats = " --nats.url " + broker.ClientURL()
	}
	fmt.Fprintf(s.out, "Publish another request:\n  %s publish --model %s --class 0 --seed 42%s\nFollow alerts:\n  %s watch%s\n", program, e.Name, nats, program, nats)
}

// dim makes text faint on a terminal.
func dim(s *streams, text string) string {
	if !s.terminal {
		return text
	}
	return "\x1b[2m" + text + "\x1b[0m"
}

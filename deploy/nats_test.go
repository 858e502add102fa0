package deploy

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	defaults "github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor/rescore"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// patience bounds every wait, far above what a slow machine needs.
const patience = 2 * time.Minute

// secrets makes a deployment's secrets and returns their directory.
func secrets(t testing.TB, args ...string) string {
	t.Helper()
	return natstest.Secrets(t, "./secrets", args...)
}

// startNATS runs the real server from nats/nats-server.conf; only ports and paths are the test's.
func startNATS(t testing.TB, secrets string) *server.Server {
	t.Helper()
	opts := natstest.Shipped(t, "nats/nats-server.conf", secrets)
	if !opts.SyncAlways {
		t.Error("sync_interval is not always: a power failure loses acknowledged messages")
	}
	if opts.HTTPHost != "127.0.0.1" {
		t.Errorf("monitoring listens on %q, must be this host only", opts.HTTPHost)
	}
	if opts.MaxPayload < schema.MaxPayload {
		t.Errorf("max_payload is %d, below the event's %d", opts.MaxPayload, schema.MaxPayload)
	}
	stream, alerting := defaults.WithDefaults(consumers.StreamConfig{}), defaults.WithDefaults(alerts.StreamConfig{})
	if need := 2*stream.MaxBytes + alerting.MaxBytes + alerts.ProbeBytes; opts.JetStreamMaxStore < need {
		t.Errorf("max_file_store is %d, and the streams that a worker makes reserve %d", opts.JetStreamMaxStore, need)
	}
	opts.HTTPPort = server.RANDOM_PORT
	return natstest.Run(t, opts)
}

// as connects as one of the users; violations of permissions arrive on the channel.
func as(t testing.TB, s *server.Server, secrets, user string, opts ...nats.Option) (*nats.Conn, chan error) {
	t.Helper()
	key, err := nats.NkeyOptionFromSeed(filepath.Join(secrets, "nats-"+user+".nk"))
	if err != nil {
		t.Fatal(err)
	}
	violations := make(chan error, 64)
	opts = append(opts, key, nats.CustomInboxPrefix("_INBOX_"+user), nats.Timeout(patience),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if errors.Is(err, nats.ErrPermissionViolation) {
				select {
				case violations <- err:
				default:
				}
			}
		}))
	nc, err := nats.Connect(s.ClientURL(), opts...)
	if err != nil {
		t.Fatalf("connect as %s: %v", user, err)
	}
	t.Cleanup(nc.Close)
	return nc, violations
}

// refused fails the test unless what do does is a violation of permissions.
func refused(t *testing.T, nc *nats.Conn, violations chan error, what string, do func() error) {
	t.Helper()
	for len(violations) > 0 {
		<-violations
	}
	if err := do(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if err := nc.FlushTimeout(patience); err != nil { // the server answers in order: a violation comes before
		t.Fatal(err)
	}
	select {
	case <-violations:
	case <-time.After(patience):
		t.Errorf("%s was allowed", what)
	}
}

// allowed fails the test if what do does is a violation of permissions.
func allowed(t *testing.T, nc *nats.Conn, violations chan error, what string, do func() error) {
	t.Helper()
	if err := do(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-violations:
		t.Errorf("%s: %v", what, err)
	default:
	}
}

func publish(nc *nats.Conn, subject string) func() error {
	return func() error { return nc.PublishRequest(subject, nc.NewRespInbox(), []byte("{}")) }
}

func subscribe(nc *nats.Conn, subject string) func() error {
	return func() error { _, err := nc.SubscribeSync(subject); return err }
}

// handler passes each event and each dead letter on, in place of the monitor.
type handler struct {
	events chan schema.Event
	dead   chan schema.Verdict
}

func (h handler) Plan(
	_ context.Context, ev schema.Event, _ schema.Delivery,
) (int, func(context.Context, schema.Delivery) error, error) {
	return 1, func(context.Context, schema.Delivery) error { h.events <- ev; return nil }, nil
}

func (h handler) DeadLetter(_ context.Context, v schema.Verdict) error { h.dead <- v; return nil }

func receive[T any](t *testing.T, from <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: nothing came", what)
		panic("unreachable")
	}
}

// shadowed is the store of a worker whose shadow gets one event, which cannot be scored.
type shadowed struct {
	given  atomic.Bool
	failed chan postgres.RescoreFailure
}

func (s *shadowed) FeedShadow(_ context.Context, _, _ string, _ int, give func([]postgres.StoredEvent) error,
) (time.Duration, bool, error) {
	if s.given.Load() {
		return 0, false, nil
	}
	err := give([]postgres.StoredEvent{{Time: time.Now().UTC(), Source: "//shop/images", ID: "1"}})
	s.given.Store(err == nil)
	return 0, false, err
}

func (s *shadowed) RescoreSource(context.Context, postgres.StoredEvent, schema.Series) (*schema.Score, bool, error) {
	return nil, false, postgres.ErrNotFound
}

func (s *shadowed) RecordRescore(context.Context, schema.Rescore) (bool, error) { return false, nil }

func (s *shadowed) FailRescore(_ context.Context, f postgres.RescoreFailure) error {
	s.failed <- f
	return nil
}

// rescores lets a worker with the given connection work on the queue of re-scores, from its stream to the last
// acknowledgement.
func rescores(t *testing.T, js jetstream.JetStream) {
	t.Helper()
	store := &shadowed{failed: make(chan postgres.RescoreFailure, 1)}
	w, err := rescore.NewWorker(js, store, nil, []rescore.Target{{Shadow: true, Share: 1, Series: schema.Series{
		Model: "fashion-mnist", EnsembleDigest: strings.Repeat("1", 64), Settings: "s"}}}, rescore.Config{Workers: 1}, nil,
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	if f := receive(t, store.failed, "the event of the shadow"); f.Kind != "gone" || f.Event.ID != "1" {
		t.Errorf("%+v", f)
	}
	eventually(t, "the job is acknowledged", func() bool {
		stream, err := js.Stream(t.Context(), "RESCORE")
		return err == nil && stream.CachedInfo().State.Msgs == 0
	})
	cancel()
	if err := receive(t, ended, "the end of the re-scores"); err != nil {
		t.Error(err)
	}
}

// TestNATSUsers runs producer, worker and subscriber with the shipped configuration, and tries what each must not do.
func TestNATSUsers(t *testing.T) {
	dir := secrets(t)
	s := startNATS(t, dir)
	if _, err := nats.Connect(s.ClientURL()); !errors.Is(err, nats.ErrAuthorization) {
		t.Fatalf("without a key: %v, want %v", err, nats.ErrAuthorization)
	}
	// The health check of docker-compose.yml.
	check := compose(t, "cpu").Services["nats"].HealthCheck.Test
	url := strings.Replace(check[len(check)-1], "127.0.0.1:8222", s.MonitorAddr().String(), 1)
	if body := get(t.Context(), url); !strings.Contains(body, "ok") {
		t.Errorf("%s: %q", url, body)
	}
	worker, workerViolations := as(t, s, dir, "worker")
	producer, producerViolations := as(t, s, dir, "producer")
	subscriber, subscriberViolations := as(t, s, dir, "subscriber")
	jetStream := func(nc *nats.Conn) jetstream.JetStream {
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		return js
	}

	// The worker does all its work: streams, consumers, the backstops, alerts.
	sink := alerts.NewStreamSink(jetStream(worker), alerts.StreamConfig{MaxBytes: 1 << 20})
	if err := sink.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h, ended := handler{events: make(chan schema.Event, 8), dead: make(chan schema.Verdict, 8)}, make(chan error, 1)
	runner, err := consumers.New(jetStream(worker), h, consumers.Config{
		Models: []string{"fashion-mnist"}, Stream: consumers.StreamConfig{MaxBytes: 1 << 20}, UnownedGrace: time.Millisecond,
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() { ended <- runner.Run(ctx) }()
	event := schema.Event{Source: "//shop/images", ID: "1", Time: time.Now().UTC(),
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassIndex(3), Seed: 7}}
	// The consumers make the stream. Until then nobody answers.
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if _, err = schema.Publish(t.Context(), jetStream(producer), event); err == nil ||
			!errors.Is(err, jetstream.ErrNoStreamResponse) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := receive(t, h.events, "the event"); got.ID != "1" {
		t.Errorf("event %q, want 1", got.ID)
	}
	event.ID, event.Data.Model = "2", "nobody"
	if _, err := schema.Publish(t.Context(), jetStream(producer), event); err != nil {
		t.Fatal(err)
	}
	if v := receive(t, h.dead, "the dead letter of an unknown model"); v.DeadLetter.Kind != schema.KindUnknownModel {
		t.Errorf("dead letter %q, want %q", v.DeadLetter.Kind, schema.KindUnknownModel)
	}

	rescores(t, jetStream(worker))

	// decuwatch canary finds the stream and publishes to it.
	canary, canaryViolations := as(t, s, dir, "canary")
	if _, err := consumers.EnsureStream(t.Context(), jetStream(canary), consumers.StreamConfig{}); err != nil {
		t.Errorf("canary: %v", err)
	}
	event.ID, event.Data.Model = "3", "fashion-mnist"
	if _, err := schema.Publish(t.Context(), jetStream(canary), event); err != nil {
		t.Errorf("canary: %v", err)
	}
	refused(t, canary, canaryViolations, "canary: publish an alert",
		publish(canary, "uncertainty.alert.fashion-mnist.critical.3"))
	refused(t, canary, canaryViolations, "canary: read alerts", subscribe(canary, "uncertainty.alert.>"))

	// Alerts reach the subscriber live and through a consumer.
	live, err := subscriber.SubscribeSync("uncertainty.alert.*.critical.*")
	if err != nil {
		t.Fatal(err)
	}
	if err := subscriber.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	alert := schema.OutboxMessage{AlertID: "a", Subject: "uncertainty.alert.fashion-mnist.critical.3", Body: []byte("{}")}
	if err := sink.Probe(t.Context(), "worker-1"); err != nil {
		t.Errorf("worker: store a probe: %v", err)
	}
	if err := sink.Send(t.Context(), alert); err != nil {
		t.Fatal(err)
	}
	if _, err := live.NextMsg(patience); err != nil {
		t.Errorf("live alert: %v", err)
	}
	verdicts, err := subscriber.SubscribeSync("uncertainty.review.*")
	if err != nil {
		t.Fatal(err)
	}
	if err := subscriber.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	if err := sink.Send(t.Context(), schema.OutboxMessage{AlertID: "a.2", Subject: "uncertainty.review.fashion-mnist",
		Body: []byte("{}")}); err != nil {
		t.Errorf("worker: publish a verdict: %v", err)
	}
	if _, err := verdicts.NextMsg(patience); err != nil {
		t.Errorf("live verdict: %v", err)
	}
	stream, err := jetStream(subscriber).Stream(t.Context(), "UNCERTAINTY")
	if err != nil {
		t.Fatal(err)
	}
	consumer, err := stream.CreateOrUpdateConsumer(t.Context(),
		jetstream.ConsumerConfig{Durable: "safety-review", AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		t.Fatal(err)
	}
	msg, err := consumer.Next(jetstream.FetchMaxWait(patience))
	if err != nil {
		t.Fatal(err)
	}
	if err := msg.DoubleAck(t.Context()); err != nil {
		t.Error(err)
	}
	// As decuwatch watch reads.
	if _, err := consumers.ReadNext(t.Context(), jetStream(subscriber), "UNCERTAINTY", 1,
		"uncertainty.alert.*.critical.*"); err != nil {
		t.Errorf("read the stream: %v", err)
	}
	// Latents of the model that the file names: the worker makes the bucket, the producer stores, the worker reads.
	latents := consumers.LatentConfig{MaxBytes: 1 << 20, MaxAge: time.Hour}
	if err := consumers.EnsureLatents(t.Context(), jetStream(worker), latents, 1, "fashion-mnist"); err != nil {
		t.Fatal(err)
	}
	latent := schema.Latent{Format: schema.FormatRaw, Dtype: "float32", Shape: []int{1, 1, 1}}
	placed, err := schema.PublishLatent(t.Context(), jetStream(producer), "fashion-mnist", latent, make([]byte, 4))
	if err != nil {
		t.Fatal(err)
	}
	object, err := consumers.NewLatents(jetStream(worker), latents).Latent(t.Context(), *placed, time.Now())
	if err != nil || len(object) != 4 {
		t.Errorf("the worker reads a latent: %d bytes, %v", len(object), err)
	}
	allowed(t, worker, workerViolations, "the worker's work", func() error { return nil })
	allowed(t, producer, producerViolations, "the producer's work", func() error { return nil })
	allowed(t, subscriber, subscriberViolations, "the subscriber's work", func() error { return nil })

	// What each must not do.
	for what, do := range map[string]func() error{
		"publish an alert":            publish(producer, "uncertainty.alert.fashion-mnist.critical.3"),
		"read alerts":                 subscribe(producer, "uncertainty.alert.>"),
		"read others' events":         subscribe(producer, "generation.requested.>"),
		"read everything":             subscribe(producer, ">"),
		"read others' replies":        subscribe(producer, "_INBOX_worker.>"),
		"read events from the stream": publish(producer, "$JS.API.STREAM.MSG.GET.GENERATION"),
		"read alerts from the stream": publish(producer, "$JS.API.DIRECT.GET.UNCERTAINTY"),
		"take the worker's events":    publish(producer, "$JS.API.CONSUMER.MSG.NEXT.GENERATION.decuwatch-fashion-mnist"),
		"make a consumer": publish(producer,
			"$JS.API.CONSUMER.CREATE.GENERATION.mine.generation.requested.fashion-mnist"),
		"delete the worker's consumer":  publish(producer, "$JS.API.CONSUMER.DELETE.GENERATION.decuwatch-fashion-mnist"),
		"acknowledge an event":          publish(producer, "$JS.ACK.GENERATION.decuwatch-fashion-mnist.1.1.1.1.0"),
		"write another model's latents": publish(producer, "$O.LATENTS_other.C.a"),
		"purge latents":                 publish(producer, "$JS.API.STREAM.PURGE.OBJ_LATENTS_fashion-mnist"),
		"delete the bucket":             publish(producer, "$JS.API.STREAM.DELETE.OBJ_LATENTS_fashion-mnist"),
		"make a bucket":                 publish(producer, "$JS.API.STREAM.CREATE.OBJ_LATENTS_other"),
		"purge the events":              publish(producer, "$JS.API.STREAM.PURGE.GENERATION"),
		"delete the alerts":             publish(producer, "$JS.API.STREAM.DELETE.UNCERTAINTY"),
		"ask for a re-score":            publish(producer, "decuwatch.rescore.fashion-mnist.1.mine"),
		"publish an advisory": publish(producer,
			"$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.GENERATION.decuwatch-fashion-mnist"),
	} {
		refused(t, producer, producerViolations, "producer: "+what, do)
	}
	for what, do := range map[string]func() error{
		"publish an event":              publish(worker, "generation.requested.fashion-mnist"),
		"delete events":                 publish(worker, "$JS.API.STREAM.DELETE.GENERATION"),
		"delete its own consumer":       publish(worker, "$JS.API.CONSUMER.DELETE.GENERATION.decuwatch-fashion-mnist"),
		"delete one event":              publish(worker, "$JS.API.STREAM.MSG.DELETE.GENERATION"),
		"change the stream":             publish(worker, "$JS.API.STREAM.UPDATE.GENERATION"),
		"make another stream":           publish(worker, "$JS.API.STREAM.CREATE.OTHER"),
		"write latents":                 publish(worker, "$O.LATENTS_fashion-mnist.C.a"),
		"delete latents":                publish(worker, "$JS.API.STREAM.PURGE.OBJ_LATENTS_fashion-mnist"),
		"delete alerts":                 publish(worker, "$JS.API.STREAM.PURGE.UNCERTAINTY"),
		"take re-scores back":           publish(worker, "$JS.API.STREAM.PURGE.RESCORE"),
		"read replies of a producer":    subscribe(worker, "_INBOX_producer.>"),
		"read messages past the stream": subscribe(worker, "generation.requested.>"),
	} {
		refused(t, worker, workerViolations, "worker: "+what, do)
	}
	for what, do := range map[string]func() error{
		"publish an event":            publish(subscriber, "generation.requested.fashion-mnist"),
		"publish an alert":            publish(subscriber, "uncertainty.alert.fashion-mnist.warn.0"),
		"read events":                 subscribe(subscriber, "generation.requested.>"),
		"read events from the stream": publish(subscriber, "$JS.API.STREAM.MSG.GET.GENERATION"),
		"delete another's consumer":   publish(subscriber, "$JS.API.CONSUMER.DELETE.UNCERTAINTY.review"),
		"change another's filter": publish(subscriber,
			"$JS.API.CONSUMER.CREATE.UNCERTAINTY.review.uncertainty.alert.none"),
		"make consumers by the dozen": publish(subscriber, "$JS.API.CONSUMER.CREATE.UNCERTAINTY.mine-1"),
		"make a nameless consumer":    publish(subscriber, "$JS.API.CONSUMER.CREATE.UNCERTAINTY"),
		"make a durable the old way":  publish(subscriber, "$JS.API.CONSUMER.DURABLE.CREATE.UNCERTAINTY.review"),
		"take another's alerts":       publish(subscriber, "$JS.API.CONSUMER.MSG.NEXT.UNCERTAINTY.review"),
		"acknowledge another's":       publish(subscriber, "$JS.ACK.UNCERTAINTY.review.1.1.1.1.0"),
		"take events":                 publish(subscriber, "$JS.API.CONSUMER.MSG.NEXT.GENERATION.decuwatch-fashion-mnist"),
		"delete alerts":               publish(subscriber, "$JS.API.STREAM.PURGE.UNCERTAINTY"),
		"read a worker's replies":     subscribe(subscriber, "_INBOX_worker.>"),
	} {
		refused(t, subscriber, subscriberViolations, "subscriber: "+what, do)
	}
	cancel()
	if err := receive(t, ended, "the end of the consumers"); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestNATSTLS shows that the include switches TLS on, with a certificate that clients check.
func TestNATSTLS(t *testing.T) {
	dir := secrets(t, "-tls", "127.0.0.1,localhost")
	s := startNATS(t, dir)
	key, err := nats.NkeyOptionFromSeed(filepath.Join(dir, "nats-producer.nk"))
	if err != nil {
		t.Fatal(err)
	}
	if nc, err := nats.Connect(s.ClientURL(), key, nats.Timeout(patience)); err == nil {
		nc.Close()
		t.Error("a client that does not know the authority was connected")
	}
	nc, _ := as(t, s, dir, "producer", nats.RootCAs(filepath.Join(dir, "nats/ca.pem")))
	state, err := nc.TLSConnectionState()
	if err != nil {
		t.Fatal(err)
	}
	if state.Version < tls.VersionTLS12 {
		t.Errorf("TLS version %#x", state.Version)
	}
}

// TestNATSCluster runs three servers from cluster.conf. A worker makes a stream of three replicas, and it stays usable
// when its leader is gone.
func TestNATSCluster(t *testing.T) {
	dir := secrets(t)
	conf := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "nats"), filepath.Join(conf, "secrets")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"nats-server.conf", "cluster.conf"} {
		content, err := os.ReadFile(filepath.Join("nats", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(conf, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var all []*server.Server
	var routes []*url.URL
	var listeners []net.Listener
	for range 3 { // routes must be known before the first server starts
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
		routes = append(routes, &url.URL{Scheme: "nats", Host: l.Addr().String()})
	}
	for i, route := range routes {
		listeners[i].Close()
		name := "nats-" + strconv.Itoa(i+1)
		t.Setenv("NATS_SERVER_NAME", name)
		opts, err := server.ProcessConfigFile(filepath.Join(conf, "cluster.conf"))
		if err != nil {
			t.Fatal(err)
		}
		if opts.ServerName != name || len(opts.Routes) != 3 || opts.Cluster.Port != 6222 || !opts.SyncAlways {
			t.Fatalf("%s: name %q, routes %v", name, opts.ServerName, opts.Routes)
		}
		opts.Host, opts.Port, opts.HTTPPort, opts.StoreDir, opts.NoSigs, opts.NoLog = "127.0.0.1", server.RANDOM_PORT,
			server.RANDOM_PORT, t.TempDir(), true, true
		if opts.Cluster.Port, err = strconv.Atoi(route.Port()); err != nil {
			t.Fatal(err)
		}
		opts.Cluster.Host, opts.Routes = "127.0.0.1", routes
		s, err := server.NewServer(opts)
		if err != nil {
			t.Fatal(err)
		}
		s.Start()
		t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
		all = append(all, s)
	}
	for _, s := range all {
		if !s.ReadyForConnections(patience) {
			t.Fatal("the server is not ready")
		}
	}
	worker, _ := as(t, all[0], dir, "worker", nats.DontRandomize())
	js, err := jetstream.New(worker)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "a stream of three replicas", func() bool {
		_, err := consumers.EnsureStream(t.Context(), js, consumers.StreamConfig{MaxBytes: 1 << 20, Replicas: 3})
		return err == nil
	})
	producer, _ := as(t, all[1], dir, "producer")
	published, err := jetstream.New(producer)
	if err != nil {
		t.Fatal(err)
	}
	event := schema.Event{Source: "//shop/images", Time: time.Now().UTC(),
		Data: schema.Generation{Model: "fashion-mnist", Class: schema.ClassIndex(3), Seed: 7}}
	publishes := func(id string) {
		event.ID = id
		eventually(t, "event "+id+" is stored", func() bool {
			_, err := schema.Publish(t.Context(), published, event)
			return err == nil
		})
	}
	publishes("1")
	for _, s := range all {
		if s.JetStreamIsStreamLeader("$G", "GENERATION") {
			s.Shutdown()
			s.WaitForShutdown()
			break
		}
	}
	publishes("2")
}

package alerts_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

func TestMain(m *testing.M) {
	natstest.RunIfChild()
	os.Exit(m.Run())
}

var quiet = slog.New(slog.DiscardHandler)

// record commits the score of an event with the given id, which raises one alert, and returns that.
func record(t *testing.T, s *postgres.Store, id string) schema.Alert {
	t.Helper()
	sc := score(.5, .1)
	sc.Event.ID, sc.Event.Time = id, time.Now().UTC().Truncate(time.Microsecond)
	sc.ScoredAt = sc.Event.Time
	for _, m := range []*schema.Measurement{&sc.ClassGap, sc.RequestRisk} {
		m.Distances, m.Shares, m.RolloutSteps = [][]float64{{0, 1}, {1, 0}}, []float64{.5, .5}, 1
	}
	sc.Receipt = schema.Receipt{
		EnsembleDigest: digest, Profile: "fixed", Settings: settings, Steps: 20, GuidanceScale: 2, Noise: "torch-cpu",
		Rows:    30,
		Runtime: "onnxruntime 1.27.0", Device: "cpu",
	}
	d := alerts.Decide(sc, table(t, threshold(1, "model", -1, schema.ClassGap, "warn", .1)))
	if len(d.Alerts) != 1 {
		t.Fatalf("decision is %+v", d)
	}
	_, err := s.Record(t.Context(), schema.Verdict{
		Delivery: schema.Delivery{Stream: "GENERATION", Sequence: 1, Delivered: 1, Digest: schema.Digest(nil, []byte(id))},
		Score:    &sc, Alerts: d.Alerts,
	})
	if err != nil {
		t.Fatal(err)
	}
	return d.Alerts[0]
}

// relay runs a relay in the background until the test ends, or stop is called.
func relay(t *testing.T, outbox alerts.Outbox, cfg alerts.RelayConfig, sinks ...alerts.Sink) (stop func()) {
	t.Helper()
	cfg.Logger = quiet
	r, err := alerts.NewRelay(outbox, cfg, sinks...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// empty waits until nothing is due at any sink.
func empty(t *testing.T, s *postgres.Store) {
	t.Helper()
	natstest.Until(t, "the outbox is empty", func() bool {
		stats, err := s.OutboxStats(t.Context())
		return err == nil && len(stats) == 0
	})
}

// inStream returns the alerts that the stream holds, by id.
func inStream(t *testing.T, js jetstream.JetStream) map[string][]schema.Alert {
	t.Helper()
	stream, err := js.Stream(t.Context(), "UNCERTAINTY")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string][]schema.Alert{}
	for seq := range stream.CachedInfo().State.LastSeq {
		msg, err := stream.GetMsg(t.Context(), seq+1)
		if err != nil {
			t.Fatal(err)
		}
		a, err := schema.DecodeAlert(msg.Data)
		if err != nil {
			t.Fatal(err)
		}
		if msg.Subject != schema.AlertSubject(a) || msg.Header.Get(schema.HeaderMessageID) != a.ID {
			t.Errorf("message %d: subject %s, id %s of alert %s", seq+1, msg.Subject, msg.Header.Get(schema.HeaderMessageID),
				a.ID)
		}
		found[a.ID] = append(found[a.ID], a)
	}
	return found
}

// counted counts how often each message is sent.
type counted struct {
	alerts.Sink
	mu   sync.Mutex
	sent map[string]int
	// fail is asked after a message was sent for the nth time, and its error returned.
	fail func(id string, n int) error
}

func (c *counted) Send(ctx context.Context, m schema.OutboxMessage) error {
	if err := c.Sink.Send(ctx, m); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent[m.AlertID]++
	if c.fail != nil {
		return c.fail(m.AlertID, c.sent[m.AlertID])
	}
	return nil
}

// Several relays at once bring each committed alert to the stream, each by one of them.
func TestRelaysShareTheOutbox(t *testing.T) {
	store := pgtest.New(t)
	js := natstest.Start(t).JetStream()
	want := map[string]schema.Alert{}
	for i := range 100 {
		a := record(t, store, fmt.Sprint("before-", i))
		want[a.ID] = a
	}
	sink := &counted{Sink: alerts.NewStreamSink(js, alerts.StreamConfig{}), sent: map[string]int{}}
	for range 3 {
		relay(t, store, alerts.RelayConfig{Batch: 7}, sink)
	}
	for i := range 50 {
		a := record(t, store, fmt.Sprint("after-", i))
		want[a.ID] = a
	}
	empty(t, store)
	got := inStream(t, js)
	if len(got) != len(want) {
		t.Errorf("the stream holds %d alerts, %d were committed", len(got), len(want))
	}
	for id, a := range want {
		if len(got[id]) != 1 || sink.sent[id] != 1 {
			t.Errorf("alert %s is in the stream %d times and was sent %d times", id, len(got[id]), sink.sent[id])
		} else if !reflect.DeepEqual(got[id][0], a) {
			t.Errorf("alert %s arrived as\n%+v\nwant\n%+v", id, got[id][0], a)
		}
	}
}

// An alert whose publishing fails for longer than the stream's duplicate window arrives all the same, with the same id.
func TestPublishFailsBeyondTheDuplicateWindow(t *testing.T) {
	store := pgtest.New(t)
	js := natstest.Start(t).JetStream()
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "UNCERTAINTY",
		Subjects: []string{"uncertainty.>"}, Duplicates: 100 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	const n = 20
	sink := &counted{Sink: alerts.NewStreamSink(js, alerts.StreamConfig{}), sent: map[string]int{}}
	sink.fail = func(string, int) error {
		// Until the window has passed for most, and what was sent again is in the stream again.
		stream, err := js.Stream(t.Context(), "UNCERTAINTY")
		if err != nil {
			return err
		}
		if stream.CachedInfo().State.Msgs < 2*n {
			return errors.New("the answer was lost")
		}
		return nil
	}
	want := map[string]bool{}
	for i := range n {
		want[record(t, store, fmt.Sprint("e", i)).ID] = true
	}
	relay(t, store, alerts.RelayConfig{RetryDelay: 20 * time.Millisecond, Poll: 20 * time.Millisecond}, sink)
	empty(t, store)
	got := inStream(t, js)
	if len(got) != len(want) {
		t.Errorf("the stream holds %d alerts by id, %d were committed", len(got), len(want))
	}
	for id := range want {
		if len(got[id]) == 0 {
			t.Errorf("alert %s did not arrive", id)
		}
		for _, a := range got[id] {
			if !reflect.DeepEqual(a, got[id][0]) {
				t.Errorf("alert %s differs between its copies", id)
			}
		}
	}
}

// Alerts that are committed while NATS is away arrive after, and the metrics say meanwhile that they are due.
func TestRelayWaitsForNATS(t *testing.T) {
	store := pgtest.New(t)
	s := natstest.Start(t)
	js := s.JetStream()
	reg := prometheus.NewRegistry()
	sink := alerts.NewStreamSink(js, alerts.StreamConfig{})
	if err := sink.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	want := record(t, store, "e")
	metrics := alerts.NewMetrics(reg, []string{want.Model}, []schema.Sink{schema.SinkStream})
	if _, err := store.AddSilence(t.Context(), postgres.Silence{Model: want.Model, Author: "ada", Reason: "known"},
		time.Hour); err != nil {
		t.Fatal(err)
	}
	relay(t, store, alerts.RelayConfig{SendTimeout: 200 * time.Millisecond, RetryDelay: 50 * time.Millisecond,
		Poll: 50 * time.Millisecond, Measure: 50 * time.Millisecond, Metrics: metrics}, sink)
	pending := func(n int) bool {
		return testutil.GatherAndCompare(reg,
			strings.NewReader(fmt.Sprintf(`# HELP decuwatch_outbox_pending Alerts that a sink has not taken yet.
# TYPE decuwatch_outbox_pending gauge
decuwatch_outbox_pending{sink="nats"} %d
`, n)), "decuwatch_outbox_pending") == nil
	}
	natstest.Until(t, "the metrics show the alert", func() bool { return pending(1) })
	natstest.Until(t, "the metrics show the silence", func() bool {
		return testutil.GatherAndCompare(reg, strings.NewReader(fmt.Sprintf(
			`# HELP decuwatch_silences_in_force Silences of a model that keep alerts from being sent now.
# TYPE decuwatch_silences_in_force gauge
decuwatch_silences_in_force{model=%q} 1
`, want.Model)), "decuwatch_silences_in_force") == nil
	})
	s.Restart()
	empty(t, store)
	if got := inStream(t, js); len(got) != 1 || len(got[want.ID]) == 0 {
		t.Errorf("the stream holds %v, want alert %s", got, want.ID)
	}
	natstest.Until(t, "the metrics show that nothing is due", func() bool { return pending(0) })
}

// Each sink gets each alert, whatever becomes of it at the other.
func TestSinksAreIndependent(t *testing.T) {
	store := pgtest.Open(t, postgres.Config{Sinks: []schema.Sink{schema.SinkStream, schema.SinkWebhook}})
	js := natstest.Start(t).JetStream()
	url, got := receiver(t)
	hook, err := alerts.NewWebhook(alerts.WebhookConfig{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	var up atomic.Bool
	broken := &counted{Sink: hook, sent: map[string]int{}, fail: func(string, int) error {
		if up.Load() {
			return nil
		}
		return errors.New("503")
	}}
	a := record(t, store, "e")
	relay(t, store, alerts.RelayConfig{RetryDelay: 10 * time.Millisecond, Poll: 10 * time.Millisecond},
		alerts.NewStreamSink(js, alerts.StreamConfig{}), broken)
	<-got
	<-got
	natstest.Until(t, "only the webhook's delivery is due", func() bool {
		stats, err := store.OutboxStats(t.Context())
		return err == nil && len(stats) == 1 && stats[0].Sink == schema.SinkWebhook && stats[0].Pending == 1
	})
	if got := inStream(t, js); len(got[a.ID]) != 1 {
		t.Errorf("the stream holds %v", got)
	}
	up.Store(true)
	for {
		select {
		case <-got: // the receiver's channel is bounded
			continue
		default:
		}
		if stats, err := store.OutboxStats(t.Context()); err == nil && len(stats) == 0 {
			return
		}
	}
}

func TestRelayRefusesTwoSinksOfOneName(t *testing.T) {
	s := alerts.NewStreamSink(nil, alerts.StreamConfig{})
	if _, err := alerts.NewRelay(nil, alerts.RelayConfig{}, s, s); err == nil {
		t.Error("two sinks of one name were accepted")
	}
	if _, err := alerts.NewRelay(nil, alerts.RelayConfig{Batch: -1}, s); err == nil {
		t.Error("a negative batch was accepted")
	}
}

// A threshold takes effect in a running process, also if the change was not announced because the connection was
// lost, and a table that cannot be read leaves the last one standing.
func TestThresholdsFollow(t *testing.T) {
	url := pgtest.URL(t)
	store, err := postgres.Open(t.Context(), postgres.Config{URL: url, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	reg := prometheus.NewRegistry()
	th, err := alerts.NewThresholds(t.Context(), store, quiet, alerts.NewMetrics(reg, []string{"fashion-mnist"}, nil))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- th.Run(ctx) }()

	set := func(value float64) {
		t.Helper()
		c := threshold(0, "class", 3, schema.ClassGap, "warn", value)
		c.Reason = "test"
		if _, err := store.SetThreshold(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	fires := func() bool { return len(th.Decide(score(.5, 0)).Alerts) == 1 }
	if fires() {
		t.Error("an alert fires without a threshold")
	}
	set(.4)
	natstest.Until(t, "the new threshold fires", fires)
	set(.6)
	natstest.Until(t, "the raised threshold does not fire", func() bool { return !fires() })

	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
		WHERE datname = pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid()`); err != nil {
		t.Fatal(err)
	}
	natstest.Until(t, "the pool has connected again", func() bool { return store.Ping(t.Context()) == nil })
	set(.3)
	natstest.Until(t, "the threshold set while nobody listened fires", fires)

	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if n, err := testutil.GatherAndCount(reg, "decuwatch_threshold_age_seconds"); err != nil || n != 1 {
		t.Errorf("%d series of the threshold's age, %v", n, err)
	}
}

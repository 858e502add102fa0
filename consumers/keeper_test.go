package consumers_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// skipper skips each event, in Postgres.
type skipper struct{ *postgres.Store }

func (s skipper) Plan(
	_ context.Context, ev schema.Event, _ schema.Delivery,
) (int, func(context.Context, schema.Delivery) error, error) {
	return 1, func(ctx context.Context, d schema.Delivery) error {
		skip := &schema.Skip{Event: ev, Reason: "sampler", Detail: "of a test"}
		_, err := s.Record(ctx, schema.Verdict{Delivery: d, Skip: skip})
		return err
	}, nil
}

// kept is a worker with a ledger and a fast keeper.
type kept struct {
	t      *testing.T
	js     jetstream.JetStream
	store  *postgres.Store
	reg    *prometheus.Registry
	runner *consumers.Runner // the last that was run
	cfg    consumers.Config
}

func newKept(t *testing.T, js jetstream.JetStream) *kept {
	k := &kept{t: t, js: js, store: pgtest.New(t), reg: prometheus.NewPedanticRegistry(), cfg: config()}
	k.cfg.Stream.CheckInterval = 20 * time.Millisecond
	k.cfg.AckWait, k.cfg.HandleTimeout = time.Second, time.Second
	k.cfg.Ledger, k.cfg.Metrics = k.store, consumers.NewMetrics(k.reg, k.cfg.Models)
	return k
}

func (k *kept) run() *worker {
	k.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &worker{stop: cancel, err: make(chan error, 1)}
	k.runner = newRunner(k.t, k.js, k.cfg, skipper{k.store})
	go func() { w.err <- k.runner.Run(ctx) }()
	k.t.Cleanup(func() { cancel(); <-w.err })
	return w
}

// verdicts returns the outcome, or the kind of dead letter, of each message that has a verdict.
func (k *kept) verdicts() map[uint64]string {
	k.t.Helper()
	list, err := k.store.VerdictsBySequence(k.t.Context(), "GENERATION", 1, 1<<40)
	if err != nil {
		k.t.Fatal(err)
	}
	found := map[uint64]string{}
	for _, v := range list {
		if found[v.Sequence] != "" {
			k.t.Errorf("message %d has two verdicts", v.Sequence)
		}
		found[v.Sequence] = string(v.Outcome)
		if v.Outcome == schema.OutcomeDeadLetter {
			found[v.Sequence] = v.Reason
		}
	}
	return found
}

// becomes waits until the messages from sequence 1 on have the given verdicts.
func (k *kept) becomes(want ...string) {
	k.t.Helper()
	var got map[uint64]string
	defer func() {
		if k.t.Failed() {
			k.t.Logf("verdicts are %v, want %q", got, want)
		}
	}()
	natstest.Until(k.t, fmt.Sprintf("the verdicts are %q", want), func() bool {
		got = k.verdicts()
		settled := 0
		for i, w := range want {
			if got[uint64(i+1)] != w {
				return false
			}
			if w != "" {
				settled++
			}
		}
		return len(got) == settled
	})
}

func (k *kept) gauge(name string, labels ...string) float64 {
	k.t.Helper()
	families, err := k.reg.Gather()
	if err != nil {
		k.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if len(labels) == 2 && (len(m.GetLabel()) == 0 || m.GetLabel()[0].GetValue() != labels[1]) {
				continue
			}
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return -1
}

func (k *kept) reaches(want float64, name string, labels ...string) {
	k.t.Helper()
	natstest.Until(k.t, fmt.Sprintf("%s%q is %g", name, labels, want),
		func() bool { return k.gauge(name, labels...) == want })
}

func (k *kept) publishTo(model string, ids ...string) {
	k.t.Helper()
	for _, id := range ids {
		ev := event(id)
		ev.Data.Model = model
		if _, err := schema.Publish(k.t.Context(), k.js, ev); err != nil {
			k.t.Fatal(err)
		}
	}
}

func durable(t *testing.T, stream jetstream.Stream, name, filter string) jetstream.Consumer {
	t.Helper()
	c, err := stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: name, FilterSubject: filter,
		AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestOrphansBecomeDeadLetters has consumers that nobody pulls from: one of a model that no configuration names any
// more, and one with a model's name but another model's filter. They are reported first.
func TestOrphansBecomeDeadLetters(t *testing.T) {
	js := natstest.Start(t).JetStream()
	k := newKept(t, js)
	stream := ensure(t, js)
	removed := durable(t, stream, consumers.Durable("removed"), schema.SubjectGeneration("removed"))
	durable(t, stream, consumers.Durable("misfit"), schema.SubjectGeneration("removed"))
	k.publishTo("removed", "r1", "r2", "r3")
	k.publishTo("misfit", "m1")
	batch, err := removed.Fetch(1) // a worker took one, and was gone
	if err != nil {
		t.Fatal(err)
	}
	<-batch.Messages()
	k.cfg.OrphanGrace = 24 * time.Hour
	w := k.run()
	publish(t, js, "ours")
	k.reaches(3, "decuwatch_orphaned_events", "model", "removed")
	k.becomes("", "", "", "", "skip")
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}

	k.cfg.OrphanGrace = 4 * time.Second
	k.run()
	k.becomes("orphaned", "orphaned", "orphaned", "orphaned", "skip")
	k.reaches(0, "decuwatch_orphaned_events", "model", "removed")
	// The owner is back: its messages get their verdict.
	if err := stream.DeleteConsumer(t.Context(), consumers.Durable("removed")); err != nil {
		t.Fatal(err)
	}
	k.publishTo("removed", "r4")
	k.becomes("orphaned", "orphaned", "orphaned", "orphaned", "skip", "unknown_model")
}

// TestOwnersAreLeftAlone has a model that another worker scores slowly. Its events are not reported and do not become
// dead letters.
func TestOwnersAreLeftAlone(t *testing.T) {
	js := natstest.Start(t).JetStream()
	k := newKept(t, js)
	stream := ensure(t, js)
	c := durable(t, stream, consumers.Durable("theirs"), schema.SubjectGeneration("theirs"))
	k.publishTo("theirs", "t1", "t2")
	first, err := c.Next()
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.Next()
	if err != nil {
		t.Fatal(err)
	}
	pulling, err := c.Consume(func(jetstream.Msg) {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pulling.Stop)
	k.cfg.OrphanGrace = time.Millisecond
	k.run()
	publish(t, js, "ours", "and ours")
	k.reaches(2, "decuwatch_consumer_ack_pending_events", "model", "theirs")
	k.becomes("", "", "skip", "skip")
	if n := k.gauge("decuwatch_orphaned_events", "model", "theirs"); n != 0 {
		t.Errorf("%g events are reported as orphaned", n)
	}
	// The owner deletes the consumer with events on it.
	pulling.Stop()
	if err := errors.Join(first.InProgress(), second.InProgress(),
		stream.DeleteConsumer(t.Context(), consumers.Durable("theirs"))); err != nil {
		t.Fatal(err)
	}
	k.becomes("unknown_model", "unknown_model", "skip", "skip")
}

// TestNothingIsSettledWithoutAnAnswer refuses the worker each way to list consumers. Events of unknown models stay in
// the stream until the list can be read: they are not acknowledged and do not become dead letters.
func TestNothingIsSettledWithoutAnAnswer(t *testing.T) {
	opts := &server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), NoLog: true, NoSigs: true,
		Users: []*server.User{{Username: "all", Password: "p"},
			{Username: "deaf", Password: "p", Permissions: &server.Permissions{
				Publish: &server.SubjectPermission{Allow: []string{">"},
					Deny: []string{"$JS.API.CONSUMER.NAMES.>", "$JS.API.CONSUMER.LIST.>"}},
			}}},
	}
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(time.Minute) {
		t.Fatal("the server is not ready")
	}
	as := func(user string) jetstream.JetStream {
		js, err := jetstream.New(natstest.Connect(t, s.ClientURL(), nats.UserInfo(user, "p")))
		if err != nil {
			t.Fatal(err)
		}
		return js
	}
	k := newKept(t, as("all"))
	ensure(t, k.js)
	k.publishTo("nobody", "1", "2", "3")
	deaf := *k
	deaf.js = as("deaf")
	w := deaf.run()
	publish(t, k.js, "ours")
	k.becomes("", "", "", "skip")
	for range 3 { // more rounds of the keeper
		publish(t, k.js, "ours")
	}
	if at := k.gauge("decuwatch_stream_checked_timestamp_seconds"); at != 0 {
		t.Errorf("the stream is said to have been checked at %g", at)
	}
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
	k.becomes("", "", "", "skip")
	view, err := consumers.ReadView(t.Context(), k.js, "GENERATION")
	if err != nil {
		t.Fatal(err)
	}
	for name := range view.Consumers {
		if name != consumers.Durable(model) {
			t.Errorf("the consumer %s acknowledges messages of models that nobody scores", name)
		}
	}
	k.run()
	k.becomes("unknown_model", "unknown_model", "unknown_model", "skip")
}

// TestSettingsAreCheckedWhileRunning changes stream and consumer while a worker runs.
func TestSettingsAreCheckedWhileRunning(t *testing.T) {
	js := natstest.Start(t).JetStream()
	k := newKept(t, js)
	stream := ensure(t, js)
	k.run()
	publish(t, js, "before")
	k.becomes("skip")

	good := stream.CachedInfo().Config
	bad := good
	bad.Discard, bad.MaxAge, bad.Duplicates = jetstream.DiscardOld, time.Second, time.Second
	edit := func(c jetstream.StreamConfig) {
		if _, err := js.UpdateStream(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	edit(bad)
	natstest.Until(t, "the worker says which settings", func() bool {
		err := k.runner.Settings()
		return err != nil && strings.Contains(err.Error(), "discard is DiscardOld, must be new") &&
			strings.Contains(err.Error(), "max_age is 1s")
	})
	k.reaches(1, "decuwatch_pulling_paused")
	edit(good)
	natstest.Until(t, "the worker is well again", func() bool { return k.runner.Settings() == nil })
	k.reaches(0, "decuwatch_pulling_paused")

	// Somebody changed the filter of a consumer: it is restored, and no event is lost.
	c, err := stream.Consumer(t.Context(), consumers.Durable(model))
	if err != nil {
		t.Fatal(err)
	}
	edited := c.CachedInfo().Config
	edited.FilterSubject = schema.SubjectGeneration("other")
	if _, err := stream.UpdateConsumer(t.Context(), edited); err != nil {
		t.Fatal(err)
	}
	publish(t, js, "during")
	natstest.Until(t, "the filter is restored", func() bool {
		c, err := stream.Consumer(t.Context(), consumers.Durable(model))
		return err == nil && c.CachedInfo().Config.FilterSubject == schema.SubjectGeneration(model)
	})
	natstest.Until(t, "the event has its verdict", func() bool {
		for seq, v := range k.verdicts() {
			if seq > 1 && v == "skip" {
				return true
			}
		}
		return false
	})

	if _, err := stream.PauseConsumer(t.Context(), consumers.Durable(model), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	k.reaches(1, "decuwatch_consumer_paused", "model", model)
	publish(t, js, "paused")
	k.reaches(1, "decuwatch_consumer_pending_events", "model", model)
	natstest.Until(t, "the age of the oldest event is exported", func() bool {
		return k.gauge("decuwatch_consumer_oldest_event_seconds", "model", model) > 0
	})
	if _, err := stream.ResumeConsumer(t.Context(), consumers.Durable(model)); err != nil {
		t.Fatal(err)
	}
	k.reaches(0, "decuwatch_consumer_paused", "model", model)
}

// TestLossIsNoticed purges messages that have no verdict, as an operator could.
func TestLossIsNoticed(t *testing.T) {
	js := natstest.Start(t).JetStream()
	k := newKept(t, js)
	stream := ensure(t, js)
	publish(t, js, ids("before", 5)...)
	w := k.run()
	k.becomes("skip", "skip", "skip", "skip", "skip")
	natstest.Until(t, "the stream is swept", func() bool {
		at, known, err := k.store.SweptTo(t.Context(), "GENERATION", stream.CachedInfo().Created)
		return err == nil && known && at == 5
	})
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
	publish(t, js, ids("lost", 7)...)
	if err := stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	publish(t, js, "after")
	k.run()
	k.reaches(7, "decuwatch_lost_events_total")
	natstest.Until(t, "the rest goes on", func() bool { return k.verdicts()[13] == "skip" })
}

// TestAcknowledgedWithoutVerdict acknowledges messages by hand, and publishes one event twice.
func TestAcknowledgedWithoutVerdict(t *testing.T) {
	js := natstest.Start(t).JetStream()
	k := newKept(t, js)
	stream := ensure(t, js)
	publish(t, js, "one", "two")
	c := durable(t, stream, consumers.Durable(model), schema.SubjectGeneration(model))
	for range 2 {
		msg, err := c.Next()
		if err != nil {
			t.Fatal(err)
		}
		if err := msg.DoubleAck(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	header, payload, err := schema.Encode(event("one"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: schema.SubjectGeneration(model), Header: header,
		Data: payload},
		jetstream.WithMsgID("another")); err != nil {
		t.Fatal(err)
	}
	k.run()
	natstest.Until(t, "each message is settled", func() bool {
		rows, err := k.store.Settled(t.Context(), "GENERATION", 1, 3)
		return err == nil && len(rows) == 3
	})
	natstest.Until(t, "the stream is swept", func() bool {
		at, known, err := k.store.SweptTo(t.Context(), "GENERATION", stream.CachedInfo().Created)
		return err == nil && known && at == 3
	})
	if n := k.gauge("decuwatch_lost_events_total"); n != 0 {
		t.Errorf("%g events are said to be lost", n)
	}
}

// TestSettledMessagesArePurged publishes many times the size of a small stream. Producers are never refused, and
// messages that a consumer has not acknowledged stay.
func TestSettledMessagesArePurged(t *testing.T) {
	js := natstest.Start(t).JetStream()
	k := newKept(t, js)
	k.cfg.Stream.MaxBytes = 1 << 20
	stream, err := consumers.EnsureStream(t.Context(), js, k.cfg.Stream)
	if err != nil {
		t.Fatal(err)
	}
	audit := durable(t, stream, "audit", "generation.requested.>")
	publish(t, js, ids("kept", 3)...)
	k.run()
	k.becomes("skip", "skip", "skip")
	large := event("large")
	large.Data.Labels = map[string]string{}
	for i := range 16 {
		large.Data.Labels[fmt.Sprintf("label%d", i)] = strings.Repeat("x", 128)
	}
	send := func(prefix string, n int) error {
		for i := range n {
			large.ID = fmt.Sprintf("%s%d", prefix, i)
			if _, err := schema.Publish(t.Context(), js, large); err != nil {
				return err
			}
		}
		return nil
	}
	if err := send("filling", 320); err != nil { // above three quarters of the limit
		t.Fatal(err)
	}
	settled(t, stream)
	if info, err := stream.Info(t.Context()); err != nil || info.State.FirstSeq != 1 {
		t.Fatalf("messages that a consumer has not taken were purged: %+v, %v", info.State, err)
	}
	for range 323 {
		msg, err := audit.Next()
		if err != nil {
			t.Fatal(err)
		}
		if err := msg.DoubleAck(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	natstest.Until(t, "settled messages are purged", func() bool {
		info, err := stream.Info(t.Context())
		return err == nil && info.State.Bytes < 3<<20/4
	})
	natstest.Until(t, "every purged message is counted", func() bool {
		info, err := stream.Info(t.Context())
		return err == nil && k.gauge("decuwatch_stream_purged_events_total") == float64(info.State.FirstSeq-1)
	})
	if err := stream.DeleteConsumer(t.Context(), "audit"); err != nil {
		t.Fatal(err)
	}
	for i := range 10 { // twice the stream's size; a producer that is faster than the worker is refused for a moment
		natstest.Until(t, "producers go on", func() bool { return send(fmt.Sprintf("more%d-", i), 80) == nil })
	}
	settled(t, stream)
	if n := k.gauge("decuwatch_lost_events_total"); n != 0 {
		t.Errorf("%g purged messages are said to be lost", n)
	}
	// Old messages are purged even if the stream is nearly empty.
	soon := *k
	soon.reg = prometheus.NewPedanticRegistry()
	soon.cfg.Stream.KeepSettled, soon.cfg.Metrics = time.Millisecond, consumers.NewMetrics(soon.reg, soon.cfg.Models)
	soon.run()
	natstest.Until(t, "old messages are purged", func() bool {
		info, err := stream.Info(t.Context())
		return err == nil && info.State.Msgs == 0
	})
}

// TestBadSettingsWhileRunningAreWaitedOut has a worker create its consumer while a setting is bad. It is not ready and
// waits, as if its keeper had found the setting.
func TestBadSettingsWhileRunningAreWaitedOut(t *testing.T) {
	js := natstest.Start(t).JetStream()
	k := newKept(t, js)
	k.cfg.Stream.CheckInterval = time.Hour // after the first look
	stream := ensure(t, js)
	w := k.run()
	publish(t, js, "before")
	k.becomes("skip")
	natstest.Until(t, "every loop pulls", func() bool { return k.runner.Pulling() == nil })

	good := stream.CachedInfo().Config
	bad := good
	bad.AllowRollup, bad.DenyPurge = true, false
	if _, err := js.UpdateStream(t.Context(), bad); err != nil {
		t.Fatal(err)
	}
	if err := stream.DeleteConsumer(t.Context(), consumers.Durable(model)); err != nil {
		t.Fatal(err)
	}
	natstest.Until(t, "the worker names the setting", func() bool {
		err := k.runner.Pulling()
		return errors.Is(err, consumers.ErrStreamConfig) && strings.Contains(err.Error(), "allow_rollup_hdrs is true")
	})
	if err := js.DeleteStream(t.Context(), "GENERATION"); err != nil { // rollups cannot be forbidden again
		t.Fatal(err)
	}
	ensure(t, js)
	publish(t, js, "after")
	natstest.Until(t, "the event has its verdict", func() bool { return k.ids("skip")["after"] })
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
}

// ids returns the ids of events that have a verdict with the given outcome or kind of dead letter.
func (k *kept) ids(outcome string) map[string]bool {
	k.t.Helper()
	list, err := k.store.VerdictsBySequence(k.t.Context(), "GENERATION", 1, 1<<40)
	if err != nil {
		k.t.Fatal(err)
	}
	ids := map[string]bool{}
	for _, v := range list {
		if string(v.Outcome) == outcome || v.Reason == outcome {
			ids[v.ID] = true
		}
	}
	return ids
}

// TestStreamRestoredFromACopy restores the stream from a copy. The stream continues after the end of the copy, so
// sequence numbers are used a second time. Those messages need their verdicts, too.
func TestStreamRestoredFromACopy(t *testing.T) {
	server := natstest.Start(t)
	k := newKept(t, server.JetStream())
	ensure(t, k.js)
	w := k.run()
	k.publishTo("nobody", "n1", "n2")
	k.becomes("unknown_model", "unknown_model")
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
	server.Stop()
	copied := t.TempDir()
	if err := os.CopyFS(copied, os.DirFS(server.StoreDir())); err != nil {
		t.Fatal(err)
	}
	server.Restart()
	k.js = server.JetStream()
	w = k.run()
	k.publishTo("nobody", "n3", "n4", "n5")
	publish(t, k.js, "ours")
	k.becomes("unknown_model", "unknown_model", "unknown_model", "unknown_model", "unknown_model", "skip")
	k.sweptTo(6)
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}

	server.Stop()
	if err := os.RemoveAll(server.StoreDir()); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(server.StoreDir(), os.DirFS(copied)); err != nil {
		t.Fatal(err)
	}
	server.Restart()
	k.js = server.JetStream()
	k.cfg.Stream.KeepSettled = time.Nanosecond // what is taken for settled is purged at once
	k.publishTo("nobody", "m3", "m4", "m5", "m6", "m7")
	k.run()
	natstest.Until(t, "every new message has its verdict", func() bool {
		found := k.ids("unknown_model")
		return found["m3"] && found["m4"] && found["m5"] && found["m6"] && found["m7"]
	})
}

// sweptTo waits until the stream was swept up to a sequence number.
func (k *kept) sweptTo(want uint64) {
	k.t.Helper()
	stream, err := k.js.Stream(k.t.Context(), "GENERATION")
	if err != nil {
		k.t.Fatal(err)
	}
	natstest.Until(k.t, "the stream is swept", func() bool {
		position, _, err := k.store.SweptTo(k.t.Context(), "GENERATION", stream.CachedInfo().Created)
		if err != nil {
			k.t.Fatal(err)
		}
		return position >= want
	})
}

// TestTerminatedThenPurged reads the advisory about a terminated message after the message was purged. The message
// keeps its one verdict.
func TestTerminatedThenPurged(t *testing.T) {
	js := natstest.Start(t).JetStream()
	k := newKept(t, js)
	stream := ensure(t, js)
	w := k.run()
	if _, err := js.Publish(t.Context(), schema.SubjectGeneration(model), []byte("junk")); err != nil {
		t.Fatal(err)
	}
	k.becomes("invalid")
	k.sweptTo(1)
	advisories, err := js.Stream(t.Context(), consumers.AdvisoryStream("GENERATION"))
	if err != nil {
		t.Fatal(err)
	}
	acknowledged := func() bool {
		c, err := advisories.Consumer(t.Context(), "terminated-decuwatch")
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0 &&
			c.CachedInfo().Delivered.Stream > 0
	}
	natstest.Until(t, "the advisory is acknowledged", acknowledged)
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := advisories.DeleteConsumer(t.Context(), "terminated-decuwatch"); err != nil { // the advisory comes again
		t.Fatal(err)
	}
	k.run()
	natstest.Until(t, "the advisory is acknowledged again", acknowledged)
	k.becomes("invalid")
}

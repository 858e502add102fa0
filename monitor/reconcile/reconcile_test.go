package reconcile_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor/reconcile"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

const model = "fashion-mnist"

func event(id string) schema.Event {
	return schema.Event{
		Source: "//images.example.com/eu", ID: id, Time: time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC),
		Data: schema.Generation{Model: model, Class: schema.ClassIndex(3), Seed: 7},
	}
}

// sides are the two sides of a comparison.
type sides struct {
	t      testing.TB
	server *natstest.Server
	js     jetstream.JetStream
	store  *postgres.Store
	stream jetstream.Stream
}

func newSides(t testing.TB) *sides {
	s := &sides{t: t, server: natstest.Start(t), store: pgtest.New(t)}
	s.js = s.server.JetStream()
	stream, err := s.js.CreateStream(t.Context(), jetstream.StreamConfig{ // single messages can be erased
		Name: "GENERATION", Subjects: []string{"generation.requested.>"}, Discard: jetstream.DiscardNew,
		MaxMsgSize: schema.MaxPayload,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.stream = stream
	return s
}

func (s *sides) publish(model, prefix string, n int) {
	s.t.Helper()
	for i := range n {
		ev := event(fmt.Sprintf("%s%d", prefix, i))
		ev.Data.Model = model
		if _, err := schema.Publish(s.t.Context(), s.js, ev); err != nil {
			s.t.Fatal(err)
		}
	}
}

// settle writes a skip for each event with one of the sequence numbers.
func (s *sides) settle(from, to uint64) {
	s.t.Helper()
	for seq := from; seq <= to; seq++ {
		m, err := consumers.ReadStored(s.t.Context(), s.js, "GENERATION", seq)
		if err != nil {
			s.t.Fatal(err)
		}
		ev, err := m.Decode()
		if err != nil {
			s.t.Fatal(err)
		}
		d := schema.Delivery{Stream: "GENERATION", Sequence: seq, Delivered: 1, Digest: m.Digest()}
		if _, err := s.store.Record(s.t.Context(),
			schema.Verdict{Delivery: d, Skip: &schema.Skip{Event: ev, Reason: "sampler", Detail: "of a test"}}); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *sides) consumer(model string) jetstream.Consumer {
	s.t.Helper()
	c, err := s.stream.CreateConsumer(s.t.Context(), jetstream.ConsumerConfig{
		Durable: consumers.Durable(model), FilterSubject: schema.SubjectGeneration(model),
		AckPolicy: jetstream.AckExplicitPolicy,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// run compares within a time that is always enough.
func (s *sides) run(from uint64) *reconcile.Report {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	r, err := reconcile.Run(ctx, reconcile.Options{JetStream: s.js, Store: s.store, Events: "GENERATION",
		Alerts: "UNCERTAINTY", From: from})
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// begin makes the ledger account for the stream from its first message on, as a worker does.
func (s *sides) begin() {
	s.t.Helper()
	if _, err := s.store.Position(s.t.Context(), "GENERATION", s.stream.CachedInfo().Created, 0); err != nil {
		s.t.Fatal(err)
	}
}

func TestAnyStreamEnds(t *testing.T) {
	s := newSides(t)
	if r := s.run(0); r.Messages != 0 || !r.Agrees() {
		t.Errorf("an empty stream: %+v", r)
	}
	corpus := natstest.HostileMessages(func(id string) []byte {
		_, payload, err := schema.Encode(event(id))
		if err != nil {
			t.Fatal(err)
		}
		return payload
	})
	s.server.PublishAllRaw(t, schema.SubjectGeneration(model), corpus)
	s.consumer(model)
	if r := s.run(0); r.Messages != len(corpus) || r.Waiting != len(corpus) {
		t.Errorf("hostile messages: %+v, want %d that wait", r, len(corpus))
	}
	if err := s.stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := s.run(0); r.Messages != 0 {
		t.Errorf("a purged stream: %+v", r)
	}
}

func TestStreamThatGrows(t *testing.T) {
	s := newSides(t)
	s.publish(model, "e", 300)
	s.consumer(model)
	ctx, stop := context.WithCancel(t.Context())
	grown := make(chan int)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			if _, err := schema.Publish(ctx, s.js, event(fmt.Sprintf("later%d", n))); err != nil {
				break
			}
		}
		grown <- n
	}()
	r := s.run(0)
	stop()
	<-grown
	if r.Messages < 300 || r.Waiting != r.Messages || !r.Agrees() {
		t.Errorf("%+v", r)
	}
}

// TestGaps erases single messages, ranges and the beginning of the stream. Messages without a verdict are lost.
func TestGaps(t *testing.T) {
	s := newSides(t)
	s.begin()
	s.consumer(model)
	s.publish(model, "e", 6000)
	for _, settled := range [][2]uint64{{1, 12}, {2000, 2010}, {5990, 6000}} {
		s.settle(settled[0], settled[1])
	}
	if err := s.stream.Purge(t.Context(), jetstream.WithPurgeSequence(16)); err != nil { // 13, 14, 15 are lost
		t.Fatal(err)
	}
	for seq := uint64(100); seq < 5995; seq++ {
		if err := s.stream.DeleteMsg(t.Context(), seq); err != nil {
			t.Fatal(err)
		}
	}
	r := s.run(0)
	lost := 3 + (5995 - 100) - 11 - 5
	if r.Messages != 84+6 || r.Lost != lost || r.Agrees() {
		t.Errorf("%+v, want 90 messages and %d lost", r, lost)
	}
	if all := strings.Join(r.Differences, "\n"); !strings.Contains(all, "messages 13 to 15 are gone") ||
		!strings.Contains(all, "messages 2011 to 5989 are gone") {
		t.Errorf("the ranges are not named:\n%s", all)
	}
	if r := s.run(5990); r.Lost != 0 || !r.Agrees() {
		t.Errorf("past the losses: %+v", r)
	}
	if r := s.run(14); r.Lost != lost-1 {
		t.Errorf("from message 14 on: %d are lost, want %d", r.Lost, lost-1)
	}
}

// TestWhatNobodyTakesDoesNotWait has an orphaned consumer, a model without a consumer, and a consumer that a worker
// pulls from.
func TestWhatNobodyTakesDoesNotWait(t *testing.T) {
	s := newSides(t)
	s.publish(model, "e", 3)
	s.publish("misfit", "m", 2)
	s.consumer(model)
	if _, err := s.stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{
		Durable: consumers.Durable("misfit"), FilterSubject: schema.SubjectGeneration(model),
		AckPolicy: jetstream.AckExplicitPolicy,
	}); err != nil {
		t.Fatal(err)
	}
	r := s.run(0)
	if r.Waiting != 3 || r.Orphaned != 2 || r.Agrees() {
		t.Errorf("%+v, want 3 that wait and 2 that are orphaned", r)
	}
}

func TestAcknowledgedWithoutAVerdict(t *testing.T) {
	s := newSides(t)
	s.publish(model, "e", 2)
	msg, err := s.consumer(model).Next()
	if err != nil {
		t.Fatal(err)
	}
	if err := msg.DoubleAck(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := s.run(0); r.Missing != 1 || r.Waiting != 1 || r.Agrees() {
		t.Errorf("%+v, want one that is missing and one that waits", r)
	}
}

// BenchmarkRun compares 100,000 settled messages.
func BenchmarkRun(b *testing.B) {
	const n = 100_000
	s := newSides(b)
	var last jetstream.PubAckFuture
	for i := range n {
		header, payload, err := schema.Encode(event(fmt.Sprint(i)))
		if err != nil {
			b.Fatal(err)
		}
		_ = header
		if last, err = s.js.PublishAsync(schema.SubjectGeneration(model), payload); err != nil {
			b.Fatal(err)
		}
	}
	<-last.Ok()
	<-s.js.PublishAsyncComplete()
	s.consumer(model)
	for b.Loop() {
		if r := s.run(0); r.Messages != n {
			b.Fatalf("%+v", r)
		}
	}
	b.ReportMetric(n*float64(b.N)/b.Elapsed().Seconds(), "messages/s")
}

// A verdict that is written while both sides are read counts as a verdict or as none yet, never as a repeat.
func TestVerdictsOfALiveMonitor(t *testing.T) {
	s := newSides(t)
	const n = 300
	s.publish(model, "e", n)
	s.consumer(model)
	s.begin()
	var writer sync.WaitGroup
	writer.Go(func() { s.settle(1, n) })
	defer writer.Wait()
	natstest.Until(t, "each event has its verdict", func() bool {
		r := s.run(0)
		if r.Messages != n || r.Repeats != 0 || r.Skips+r.Waiting != n || !r.Agrees() {
			t.Fatalf("%+v, want %d messages that are skips or wait", r, n)
		}
		return r.Skips == n
	})
}

// Alerts that are raised and published while both sides are read are not lost.
func TestAlertsOfALiveMonitor(t *testing.T) {
	s := newSides(t)
	relay, err := alerts.NewRelay(s.store, alerts.RelayConfig{Logger: slog.New(slog.DiscardHandler)},
		alerts.NewStreamSink(s.js, alerts.StreamConfig{}))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() {
		if err := relay.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	const most = 400
	raised := 0
	parts.Go(func() {
		for ; raised < most && ctx.Err() == nil; raised++ {
			id := schema.ID("live", fmt.Sprint(raised))
			if _, err := s.store.RaiseAlert(context.Background(), schema.Alert{
				ID: id, Kind: schema.AlertCanaryMissed, Source: "/tests", EventID: id, EventTime: time.Now().UTC(),
				Model: model, ClassIndex: 1, ClassLabel: "Bag", Severity: schema.SeverityCritical,
				Reason: schema.Reason(schema.AlertCanaryMissed), FiredAt: time.Now().UTC(),
			}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	seen := 0
	for range 40 {
		r := s.run(0)
		if r.LostAlerts != 0 || r.UnknownAlerts != 0 {
			t.Fatalf("of %d alerts %d are lost and %d unknown: %q", r.Alerts, r.LostAlerts, r.UnknownAlerts, r.Differences)
		}
		seen = max(seen, r.Published)
	}
	natstest.Until(t, "every alert is published", func() bool {
		r := s.run(0)
		seen = r.Published
		return r.Published == r.Alerts && r.OwedAlerts == 0 && r.Alerts == most
	})
	stop()
	parts.Wait()
	if seen != most {
		t.Errorf("%d alerts are published, want %d", seen, most)
	}
}

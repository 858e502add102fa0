package redeliver_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor/redeliver"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// worker skips each event in Postgres, or fails.
type worker struct {
	*postgres.Store
	fail error
}

func (w worker) Plan(
	_ context.Context, ev schema.Event, _ schema.Delivery,
) (int, func(context.Context, schema.Delivery) error, error) {
	return 1, func(ctx context.Context, d schema.Delivery) error { return w.handle(ctx, ev, d) }, nil
}

func (w worker) handle(ctx context.Context, ev schema.Event, d schema.Delivery) error {
	if known, err := w.Known(ctx, ev.Identity(), d); known || err != nil {
		return err
	}
	if w.fail != nil {
		return w.fail
	}
	_, err := w.Record(ctx, schema.Verdict{Delivery: d, Skip: &schema.Skip{Event: ev, Reason: "sampler",
		Detail: "of a test"}})
	return err
}

// run runs a worker of the models until the test, or stop, ends it.
func run(t *testing.T, js jetstream.JetStream, w worker, models ...string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	cfg := consumers.Config{
		Models: models, RetryDelay: 10 * time.Millisecond, RetryMaxDelay: 50 * time.Millisecond,
		UnownedGrace: time.Millisecond, PullExpiry: time.Second,
		Stream: consumers.StreamConfig{CheckInterval: 20 * time.Millisecond}, Ledger: w.Store,
		Logger: slog.New(slog.DiscardHandler),
	}
	runner, err := consumers.New(js, w, cfg)
	if err != nil {
		t.Fatal(err)
	}
	go func() { ended <- runner.Run(ctx) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		ended <- nil
	}
	t.Cleanup(stop)
	return stop
}

func event(id, model string) schema.Event {
	return schema.Event{
		Source: "//images.example.com/eu", ID: id, Time: time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC),
		Data: schema.Generation{Model: model, Class: schema.ClassIndex(3), Seed: 7},
	}
}

// outcomes returns the outcome of each message, or the kind of its dead letter.
func outcomes(t *testing.T, store *postgres.Store) map[uint64]string {
	t.Helper()
	list, err := store.VerdictsBySequence(t.Context(), "GENERATION", 1, 1000)
	if err != nil {
		t.Fatal(err)
	}
	found := map[uint64]string{}
	for _, v := range list {
		found[v.Sequence] = strings.TrimSuffix(string(v.Outcome)+" "+v.Reason, " ")
	}
	return found
}

func until(t *testing.T, store *postgres.Store, sequence uint64, want string) {
	t.Helper()
	natstest.Until(t, want, func() bool { return outcomes(t, store)[sequence] == want })
}

func collect(t *testing.T, o redeliver.Options) []redeliver.Result {
	t.Helper()
	var list []redeliver.Result
	if err := redeliver.Run(t.Context(), o,
		func(r redeliver.Result) error { list = append(list, r); return nil }); err != nil {
		t.Fatal(err)
	}
	return list
}

func TestDeadLettersComeBack(t *testing.T) {
	js, store := natstest.Start(t).JetStream(), pgtest.New(t)
	stop := run(t, js, worker{Store: store, fail: errors.New("the session was lost")}, "ours")
	natstest.Until(t, "the stream is there",
		func() bool { _, err := js.Stream(t.Context(), "GENERATION"); return err == nil })
	publish := func(ev schema.Event) {
		t.Helper()
		if _, err := schema.Publish(t.Context(), js, ev); err != nil {
			t.Fatal(err)
		}
	}
	publish(event("in the stream", "new"))
	publish(event("has left", "new"))
	publish(event("failed", "ours"))
	// In binary mode, with an instruction to the server that must not be repeated.
	_, payload, err := schema.Encode(event("binary", "new"))
	if err != nil {
		t.Fatal(err)
	}
	binary := &nats.Msg{Subject: schema.SubjectGeneration("new"), Header: nats.Header{
		"ce-specversion": {"1.0"}, "ce-type": {schema.TypeGenerationRequested}, "ce-source": {"/s"}, "ce-id": {"binary"},
		"ce-time": {"2026-05-04T03:02:01Z"},
		"Status":  {"404"},
	}, Data: payload[strings.Index(string(payload), `{"model"`) : len(payload)-1]}
	if _, err := js.PublishMsg(t.Context(), binary); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), schema.SubjectGeneration("ours"), []byte("no event")); err != nil {
		t.Fatal(err)
	}
	for sequence, want := range map[uint64]string{1: "dead_letter unknown_model", 2: "dead_letter unknown_model",
		3: "dead_letter failed", 4: "dead_letter unknown_model", 5: "dead_letter invalid"} {
		until(t, store, sequence, want)
	}
	stop()
	if _, err := purge(t, js, 3); err != nil {
		t.Fatal(err)
	}

	o := redeliver.Options{JetStream: js, Store: store, By: "alice", Query: postgres.DeadLetterQuery{Stream: "GENERATION",
		Kinds: redeliver.Kinds()}}
	if list := collect(t, o); len(list) != 4 {
		t.Fatalf("%d dead letters can be looked at, want 4: %+v", len(list), list)
	}
	if n := len(outcomes(t, store)); n != 5 {
		t.Errorf("looking changed the verdicts: %d of 5 are left", n)
	}
	o.Apply = true
	for _, r := range collect(t, o) {
		if r.Refused != "" || r.Sequence == 0 {
			t.Errorf("%s: refused %q, published as %d", r.DeadLetter.EventID, r.Refused, r.Sequence)
		}
	}
	if list := collect(t, o); len(list) != 0 {
		t.Errorf("%d dead letters are brought back twice", len(list))
	}
	run(t, js, worker{Store: store}, "ours", "new")
	for sequence := uint64(6); sequence <= 9; sequence++ {
		until(t, store, sequence, "skip sampler")
	}
	for sequence, want := range map[uint64]string{1: "dead_letter unknown_model", 3: "dead_letter failed",
		5: "dead_letter invalid"} {
		if got := outcomes(t, store)[sequence]; got != want {
			t.Errorf("message %d is %q, want %q as before", sequence, got, want)
		}
	}
	if _, err := store.Redeliver(t.Context(), deadLetter(t, store), "alice"); err == nil ||
		!strings.Contains(err.Error(), "is invalid, must be orphaned") {
		t.Errorf("redeliver an invalid message: %v", err)
	}
}

// purge removes the messages below a sequence number.
func purge(t *testing.T, js jetstream.JetStream, below uint64) (jetstream.Stream, error) {
	t.Helper()
	stream, err := js.Stream(t.Context(), "GENERATION")
	if err != nil {
		return nil, err
	}
	return stream, stream.Purge(t.Context(), jetstream.WithPurgeSequence(below))
}

// deadLetter returns the number of the dead letter of the message that is not an event.
func deadLetter(t *testing.T, store *postgres.Store) int64 {
	t.Helper()
	var id int64
	if err := store.EachDeadLetter(t.Context(), postgres.DeadLetterQuery{Stream: "GENERATION",
		Kinds: []schema.DeadLetterKind{schema.KindInvalid}}, func(l postgres.StoredDeadLetter) error {
		id = l.ID
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return id
}

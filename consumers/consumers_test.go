package consumers_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

func TestMain(m *testing.M) {
	natstest.RunIfChild()
	os.Exit(m.Run())
}

const model = "fashion-mnist"

// recorder is a handler that records what it gets.
type recorder struct {
	mu          sync.Mutex
	handled     map[string][]schema.Delivery // by the event's id
	done        map[string]bool              // ids that were handled without an error
	deadLetters map[uint64]schema.Verdict    // by sequence number

	handle func(context.Context, schema.Event, schema.Delivery) error // nil returns nil
	plan   func(context.Context, schema.Event) error                  // nil returns nil
	rows   int
	refuse atomic.Pointer[error] // what DeadLetter returns
	whole  error                 // what DeadLetter returns for one that holds anything of its message
}

func newRecorder() *recorder {
	return &recorder{handled: map[string][]schema.Delivery{}, done: map[string]bool{},
		deadLetters: map[uint64]schema.Verdict{}, rows: 1}
}

func (r *recorder) Plan(
	ctx context.Context, ev schema.Event, _ schema.Delivery,
) (int, func(context.Context, schema.Delivery) error, error) {
	if r.plan != nil {
		if err := r.plan(ctx, ev); err != nil {
			return 0, nil, err
		}
	}
	return r.rows, func(ctx context.Context, d schema.Delivery) error { return r.take(ctx, ev, d) }, nil
}

func (r *recorder) take(ctx context.Context, ev schema.Event, d schema.Delivery) error {
	r.mu.Lock()
	r.handled[ev.ID] = append(r.handled[ev.ID], d)
	r.mu.Unlock()
	var err error
	if r.handle != nil {
		err = r.handle(ctx, ev, d)
	}
	if err == nil {
		r.mu.Lock()
		r.done[ev.ID] = true
		r.mu.Unlock()
	}
	return err
}

func (r *recorder) DeadLetter(_ context.Context, v schema.Verdict) error {
	if err := r.refuse.Load(); err != nil {
		return *err
	}
	if l := v.DeadLetter; r.whole != nil && (l.Event != nil || len(l.Payload) > 0) {
		return r.whole
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.deadLetters[v.Delivery.Sequence]; !ok { // the first verdict stands
		r.deadLetters[v.Delivery.Sequence] = v
	}
	return nil
}

func (r *recorder) count() (done, deadLetters int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.done), len(r.deadLetters)
}

func (r *recorder) deliveries(id string) []schema.Delivery {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]schema.Delivery(nil), r.handled[id]...)
}

func (r *recorder) deadLetter(sequence uint64) *schema.DeadLetter {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.deadLetters[sequence].DeadLetter
}

// permanent is an error after which retrying will not help.
type permanent struct{ error }

func (permanent) DeadLetterKind() schema.DeadLetterKind { return schema.KindUnknownClass }

// config returns a configuration with short retries.
func config() consumers.Config {
	return consumers.Config{
		Models: []string{model}, RetryDelay: 10 * time.Millisecond, RetryMaxDelay: 50 * time.Millisecond,
		UnownedGrace: time.Millisecond, PullExpiry: time.Second, Logger: slog.New(slog.DiscardHandler),
	}
}

// worker is a Runner that runs in the background.
type worker struct {
	stop func()
	err  chan error
}

func newRunner(t testing.TB, js jetstream.JetStream, cfg consumers.Config, h consumers.Handler) *consumers.Runner {
	t.Helper()
	r, err := consumers.New(js, h, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func run(t *testing.T, js jetstream.JetStream, cfg consumers.Config, r *recorder) *worker {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &worker{stop: cancel, err: make(chan error, 1)}
	runner := newRunner(t, js, cfg, r)
	go func() { w.err <- runner.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-w.err })
	return w
}

// wait stops the worker and returns what Run returned.
func (w *worker) wait() error {
	w.stop()
	err := <-w.err
	w.err <- err // for the cleanup
	return err
}

func event(id string) schema.Event {
	return schema.Event{
		Source: "//images.example.com/eu", ID: id, Time: time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC),
		Data: schema.Generation{Model: model, Class: schema.ClassIndex(3), Seed: 7},
	}
}

func ensure(t *testing.T, js jetstream.JetStream) jetstream.Stream {
	t.Helper()
	var stream jetstream.Stream
	natstest.Until(t, "the stream is there", func() bool { // a server that was just restarted may not answer yet
		var err error
		stream, err = consumers.EnsureStream(t.Context(), js, consumers.StreamConfig{})
		return err == nil
	})
	return stream
}

// publish stores events with the given ids, in order.
func publish(t *testing.T, js jetstream.JetStream, ids ...string) {
	t.Helper()
	for _, id := range ids {
		natstest.Until(t, "the event is stored", func() bool {
			_, err := schema.Publish(t.Context(), js, event(id))
			return err == nil
		})
	}
}

func ids(prefix string, n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("%s%d", prefix, i)
	}
	return list
}

// settled waits until the model's consumer has no pending messages.
func settled(t *testing.T, stream jetstream.Stream) {
	t.Helper()
	natstest.Until(t, "each message is acknowledged", func() bool {
		c, err := stream.Consumer(t.Context(), consumers.Durable(model))
		if err != nil {
			return false
		}
		last, err := stream.GetLastMsgForSubject(t.Context(), schema.SubjectGeneration(model))
		if err != nil {
			t.Fatal(err)
		}
		// A consumer that was just created or updated may not have counted its pending messages.
		info := c.CachedInfo()
		return info.NumPending == 0 && info.NumAckPending == 0 && info.AckFloor.Stream >= last.Sequence
	})
}

// advisoriesStored waits until the named consumers of the server's advisories exist, so that no advisory is lost.
func advisoriesStored(t *testing.T, js jetstream.JetStream, consumer ...string) {
	t.Helper()
	natstest.Until(t, "the advisories are stored", func() bool {
		for _, name := range consumer {
			if _, err := js.Consumer(t.Context(), consumers.AdvisoryStream("GENERATION"), name); err != nil {
				return false
			}
		}
		return true
	})
}

func TestEachEventIsHandledOnceAndAcknowledged(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("e", 300)...)
	r := newRecorder()
	w := run(t, js, config(), r)
	settled(t, stream)
	if done, deadLetters := r.count(); done != 300 || deadLetters != 0 {
		t.Errorf("%d events were handled and %d became dead letters, published 300", done, deadLetters)
	}
	for _, id := range ids("e", 300) {
		if n := len(r.deliveries(id)); n != 1 {
			t.Errorf("event %s was handled %d times", id, n)
		}
	}
	d := r.deliveries("e41")[0]
	header, payload, err := schema.Encode(event("e41"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (schema.Delivery{Stream: "GENERATION", Sequence: 42, Time: d.Time, Delivered: 1,
		Digest: schema.Digest(header, payload)}); d != want {
		t.Errorf("delivery is %+v, want %+v", d, want)
	}
	if age := time.Since(d.Time); age < 0 || age > time.Minute {
		t.Errorf("the stream's time of the message is %s ago", age)
	}
	if err := w.wait(); err != nil {
		t.Error(err)
	}
}

func TestRunWaitsForNATS(t *testing.T) {
	s := natstest.Start(t)
	url := s.URL()
	s.Kill()
	nc, err := nats.Connect(url, nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1),
		nats.ReconnectWait(20*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	r := newRecorder()
	run(t, js, config(), r)
	s.Restart()
	producer := s.JetStream()
	ensure(t, producer)
	publish(t, producer, "late")
	natstest.Until(t, "the event is handled", func() bool { done, _ := r.count(); return done == 1 })
}

func TestServerIsKilledAndRestarted(t *testing.T) {
	s := natstest.StartWith(t, natstest.Options{Process: true})
	js := s.JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("before", 200)...)
	r := newRecorder()
	var once sync.Once
	reached := make(chan struct{})
	r.handle = func(_ context.Context, ev schema.Event, _ schema.Delivery) error {
		if ev.ID == "before100" {
			once.Do(func() { close(reached) })
		}
		return nil
	}
	cfg := config()
	cfg.AckWait = 2 * time.Second
	cfg.MaxInFlight = 16
	run(t, js, cfg, r)
	<-reached
	s.Kill()
	s.Restart()
	publish(t, s.JetStream(), ids("after", 50)...)
	natstest.Until(t, "every event is handled", func() bool { done, _ := r.count(); return done == 250 })
	settled(t, stream)
}

func TestFailedHandlingIsTriedAgainThenBuried(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	publish(t, js, "heals", "fails", "panics", "permanent", "refused", "late")
	r := newRecorder()
	r.handle = func(ctx context.Context, ev schema.Event, d schema.Delivery) error {
		switch ev.ID {
		case "heals":
			if d.Delivered < 3 {
				return errors.New("the session was lost")
			}
			return nil
		case "panics":
			panic("out of range")
		case "permanent":
			return fmt.Errorf("score: %w", permanent{errors.New("class 12 of 10")})
		case "refused":
			return fmt.Errorf("score: %w", &schema.Invalid{Field: "data.class", Reason: "must be below 10"})
		case "late":
			<-ctx.Done()
			return ctx.Err()
		}
		return errors.New("the session\nwas lost")
	}
	cfg := config()
	cfg.MaxDeliver = 3
	cfg.HandleTimeout = 100 * time.Millisecond // a slow machine may add its error to another's
	reg := prometheus.NewPedanticRegistry()
	cfg.Metrics = consumers.NewMetrics(reg, cfg.Models)
	run(t, js, cfg, r)
	natstest.Until(t, "each has its verdict",
		func() bool { done, deadLetters := r.count(); return done == 1 && deadLetters == 5 })
	settled(t, stream)

	for _, c := range []struct {
		id         string
		sequence   uint64
		deliveries int
		want       *schema.DeadLetter
	}{
		{"heals", 1, 3, nil},
		{"fails", 2, 3, &schema.DeadLetter{Kind: "failed", Reason: "the session was lost"}},
		{"panics", 3, 3, &schema.DeadLetter{Kind: "failed", Reason: "the handler panicked: out of range"}},
		{"permanent", 4, 1, &schema.DeadLetter{Kind: "unknown_class", Reason: "score: class 12 of 10"}},
		{"refused", 5, 1, &schema.DeadLetter{Kind: "invalid", Field: "data.class", Reason: "must be below 10"}},
		{"late", 6, 3, &schema.DeadLetter{Kind: "failed",
			Reason: "handle event timed out after 100ms: context deadline exceeded"}},
	} {
		if n := len(r.deliveries(c.id)); n != c.deliveries {
			t.Errorf("%s was handled %d times, want %d", c.id, n, c.deliveries)
		}
		got := r.deadLetter(c.sequence)
		switch {
		case c.want == nil && got != nil:
			t.Errorf("%s became a dead letter: %+v", c.id, got)
		case c.want != nil && got == nil:
			t.Errorf("%s did not become a dead letter", c.id)
		case got != nil:
			if got.Kind != c.want.Kind || got.Field != c.want.Field || !strings.HasSuffix(got.Reason, c.want.Reason) {
				t.Errorf("%s: dead letter of kind %q, field %q: %q; want %q, %q: %q", c.id, got.Kind, got.Field, got.Reason,
					c.want.Kind, c.want.Field, c.want.Reason)
			}
			if got.Event == nil || got.Event.ID != c.id || got.Subject != schema.SubjectGeneration(model) ||
				len(got.Payload) == 0 {
				t.Errorf("%s: the dead letter does not carry its message: %+v", c.id, got)
			}
		}
	}
	want := `# HELP decuwatch_dead_letters_total Messages that became a dead letter, by kind.
# TYPE decuwatch_dead_letters_total counter
decuwatch_dead_letters_total{kind="failed"} 3
decuwatch_dead_letters_total{kind="invalid"} 1
decuwatch_dead_letters_total{kind="unknown_class"} 1
decuwatch_dead_letters_total{kind="unknown_model"} 0
`
	// given_up counts the advisories about the five terminations that were read so far.
	got := map[string]float64{}
	for _, kind := range []string{"failed", "invalid", "unknown_class", "unknown_model"} {
		got[kind] = counter(t, reg, "decuwatch_dead_letters_total", "kind", kind)
	}
	for kind, n := range got {
		if !strings.Contains(want, fmt.Sprintf("kind=%q} %g\n", kind, n)) {
			t.Errorf("%g dead letters of kind %s are counted, want\n%s", n, kind, want)
		}
	}
}

// counter returns the value of one series.
func counter(t *testing.T, reg prometheus.Gatherer, name, label, value string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == name && l.GetName() == label && l.GetValue() == value {
					return m.GetCounter().GetValue()
				}
			}
		}
	}
	t.Fatalf("no series %s{%s=%q}", name, label, value)
	return 0
}

// Broken messages become dead letters in one delivery each. The dead letter names the broken field. The messages
// between them are handled.
func TestPoison(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	_, good, err := schema.Encode(event("good"))
	if err != nil {
		t.Fatal(err)
	}
	edit := func(old, with string) []byte {
		s := strings.Replace(string(good), old, with, 1)
		if s == string(good) {
			t.Fatalf("%s does not hold %s", good, old)
		}
		return []byte(s)
	}
	corpus := []struct {
		name    string
		payload []byte
		field   string
	}{
		{"no JSON", []byte("{"), "payload"},
		{"empty", nil, "payload"},
		{"deep", []byte(strings.Repeat("[", 10000)), "payload"},
		{"type", edit(schema.TypeGenerationRequested, "io.decuwatch.other"), "type"},
		{"no time", edit(`"time":"2026-05-04T03:02:01Z",`, ""), "time"},
		{"steps", edit(`"seed":7`, `"seed":7,"sampler":{"name":"ddim","steps":1e9,"guidance_scale":2,"eta":0}`),
			"data.sampler.steps"},
		{"guidance", edit(`"seed":7`, `"seed":7,"sampler":{"name":"ddim","steps":20,"guidance_scale":NaN,"eta":0}`), ""},
		{"class", edit(`"class":3`, `"class":-1`), "data.class"},
		{"model", edit(`"model":"fashion-mnist"`, `"model":"cifar"`), "data.model"},
		{"unknown field", edit(`"seed":7`, `"seed":7,"prompt":"x"`), "data.prompt"},
		{"NUL", edit(`"id":"good"`, `"id":"a\u0000b"`), "id"},
		{"not UTF-8", []byte("{\"id\":\"\xff\"}"), "payload"},
	}
	r := newRecorder()
	cfg := config()
	reg := prometheus.NewRegistry()
	cfg.Metrics = consumers.NewMetrics(reg, cfg.Models)
	run(t, js, cfg, r)
	advisoriesStored(t, js, "terminated-decuwatch")
	for i, c := range corpus {
		if _, err := js.Publish(t.Context(), schema.SubjectGeneration(model), c.payload); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		publish(t, js, fmt.Sprintf("neighbour%d", i))
	}
	// The stream refuses what is larger than the bound.
	if _, err := js.Publish(t.Context(), schema.SubjectGeneration(model), make([]byte, 1<<20-1024)); err == nil {
		t.Error("the stream took a message of nearly 1 MiB")
	}
	settled(t, stream)
	if done, deadLetters := r.count(); done != len(corpus) || deadLetters != len(corpus) {
		t.Errorf("%d neighbours were handled and %d dead letters written, want %d of each", done, deadLetters, len(corpus))
	}
	for i, c := range corpus {
		l := r.deadLetter(uint64(2*i + 1))
		if l == nil {
			t.Errorf("%s: no dead letter", c.name)
			continue
		}
		if l.Kind != schema.KindInvalid || l.Reason == "" || c.field != "" && l.Field != c.field {
			t.Errorf("%s: dead letter of kind %s, field %q: %q; want field %q", c.name, l.Kind, l.Field, l.Reason, c.field)
		}
		if string(l.Payload) != string(c.payload) {
			t.Errorf("%s: the dead letter's payload is %.80q", c.name, l.Payload)
		}
	}
	if n := counter(t, reg, "decuwatch_redeliveries_total", "model", model); n != 0 {
		t.Errorf("%g messages were delivered again", n)
	}
	// The server's advisories about the terminated messages create no further dead letters, and none is counted.
	natstest.Until(t, "each advisory is acknowledged", func() bool {
		advisories, err := js.Stream(t.Context(), consumers.AdvisoryStream("GENERATION"))
		if err != nil {
			t.Fatal(err)
		}
		c, err := advisories.Consumer(t.Context(), "terminated-decuwatch")
		if err != nil {
			t.Fatal(err)
		}
		stored := advisories.CachedInfo().State
		return stored.Msgs >= uint64(len(corpus)) && c.CachedInfo().AckFloor.Stream >= stored.LastSeq
	})
	for kind, want := range map[schema.DeadLetterKind]int{schema.KindInvalid: len(corpus), schema.KindGivenUp: 0} {
		if n := counter(t, reg, "decuwatch_dead_letters_total", "kind", string(kind)); n != float64(want) {
			t.Errorf("%g dead letters of kind %s are counted, want %d", n, kind, want)
		}
	}
}

// TestRefusedDeadLetter has the database refuse the content of a message. The message gets its one verdict
// nevertheless.
func TestRefusedDeadLetter(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	r := newRecorder()
	r.whole = errors.New("invalid byte sequence (SQLSTATE 22021)")
	r.handle = func(context.Context, schema.Event, schema.Delivery) error {
		return permanent{errors.New("no such class")}
	}
	run(t, js, config(), r)
	publish(t, js, "poison")
	settled(t, stream)
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.deadLetters[1].DeadLetter
	if l == nil || l.Kind != "unknown_class" || !strings.Contains(l.Reason, "no such class") ||
		!strings.Contains(l.Reason, "SQLSTATE 22021") {
		t.Errorf("dead letter is %+v", l)
	}
	if n := len(r.handled["poison"]); n != 1 {
		t.Errorf("handled %d times", n)
	}
}

// A message on a subject without a consumer becomes a dead letter. A message that another worker's consumer takes does
// not.
func TestUnownedSubjects(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	if _, err := stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: consumers.Durable("elsewhere"),
		FilterSubject: schema.SubjectGeneration("elsewhere"), AckPolicy: jetstream.AckExplicitPolicy}); err != nil {
		t.Fatal(err)
	}
	ev := event("theirs")
	ev.Data.Model = "elsewhere"
	header, payload, err := schema.Encode(ev)
	if err != nil {
		t.Fatal(err)
	}
	for _, subject := range []string{"generation.requested.elsewhere", "generation.requested.nobody",
		"generation.requested." + model + ".deeper"} {
		if _, err := js.Publish(t.Context(), subject, payload); err != nil {
			t.Fatal(err)
		}
	}
	publish(t, js, "ours")
	r := newRecorder()
	run(t, js, config(), r)
	natstest.Until(t, "the two are dead letters",
		func() bool { done, deadLetters := r.count(); return done == 1 && deadLetters == 2 })
	for _, sequence := range []uint64{2, 3} {
		l := r.deadLetter(sequence)
		if l == nil || l.Kind != schema.KindUnknownModel || l.Field != "data.model" || l.Event == nil ||
			l.Event.ID != "theirs" || string(l.Payload) != string(payload) {
			t.Errorf("message %d: dead letter is %+v", sequence, l)
		}
	}
	if d := r.deadLetters[2].Delivery; d.Digest != schema.Digest(nil, payload) || d.Stream != "GENERATION" {
		t.Errorf("delivery is %+v", d)
	}
	_ = header
}

// After the last delivery that a consumer allows, a message is handled like any other. A message that was terminated by
// hand becomes a dead letter, because of the server's advisory.
func TestServerGivesUp(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	cfg := config()
	cfg.MaxDeliver = 2
	r := newRecorder()
	w := run(t, js, cfg, r)
	publish(t, js, "first")
	settled(t, stream)
	advisoriesStored(t, js, consumers.Durable(model), "terminated-decuwatch")
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}

	// A worker of an earlier version takes messages and then dies.
	c, err := stream.Consumer(t.Context(), consumers.Durable(model))
	if err != nil {
		t.Fatal(err)
	}
	bounded := c.CachedInfo().Config
	if bounded.MaxDeliver != -1 {
		t.Errorf("the consumer delivers a message at most %d times", bounded.MaxDeliver)
	}
	bounded.MaxDeliver = 2
	if c, err = stream.UpdateConsumer(t.Context(), bounded); err != nil {
		t.Fatal(err)
	}
	publish(t, js, "innocent", "by-hand", "failing")
	taken := map[uint64]int{}
	natstest.Until(t, "the deliveries are used up", func() bool {
		batch, err := c.Fetch(3, jetstream.FetchMaxWait(100*time.Millisecond))
		if err != nil {
			return false
		}
		for msg := range batch.Messages() {
			meta, err := msg.Metadata()
			if err != nil {
				t.Error(err)
				return true
			}
			if taken[meta.Sequence.Stream]++; meta.Sequence.Stream == 3 {
				err = msg.TermWithReason("not now")
			} else {
				err = msg.Nak()
			}
			if err != nil {
				t.Error(err)
			}
		}
		return taken[2] == 2 && taken[3] == 1 && taken[4] == 2
	})
	r.handle = func(_ context.Context, ev schema.Event, _ schema.Delivery) error {
		if ev.ID == "failing" {
			return errors.New("the session was lost")
		}
		return nil
	}
	run(t, js, cfg, r)
	natstest.Until(t, "each has its verdict",
		func() bool { done, deadLetters := r.count(); return done == 2 && deadLetters == 2 })
	if !r.done["innocent"] {
		t.Errorf("handled are %v", r.done)
	}
	if c, err = stream.Consumer(t.Context(), consumers.Durable(model)); err != nil ||
		c.CachedInfo().Config.MaxDeliver != -1 {
		t.Errorf("the consumer was not updated: %v", err)
	}
	if l := r.deadLetter(3); l == nil || l.Kind != schema.KindGivenUp ||
		l.Reason != "terminated after 1 deliveries: not now" || l.Event == nil || l.Event.ID != "by-hand" {
		t.Errorf("dead letter is %+v", l)
	}
	if l := r.deadLetter(4); l == nil || l.Kind != schema.KindFailed || l.Reason != "the session was lost" ||
		l.Event == nil || l.Event.ID != "failing" {
		t.Errorf("dead letter is %+v", l)
	}
}

// While a dependency is away, nothing is pulled, messages in flight are kept, and no attempt counts.
func TestPulledNothingWhileUnwell(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	var away atomic.Bool
	away.Store(true)
	var asked atomic.Int64
	errAway := errors.New("connection refused")
	r := newRecorder()
	r.handle = func(context.Context, schema.Event, schema.Delivery) error {
		if away.Load() {
			return errAway
		}
		return nil
	}
	r.refuse.Store(&errAway)
	cfg := config()
	cfg.MaxInFlight = 8
	cfg.MaxDeliver = 2
	cfg.Healthy = func(context.Context) error {
		asked.Add(1)
		if away.Load() {
			return errAway
		}
		return nil
	}
	reg := prometheus.NewRegistry()
	cfg.Metrics = consumers.NewMetrics(reg, cfg.Models)
	publish(t, js, ids("e", 50)...)
	if _, err := js.Publish(t.Context(), schema.SubjectGeneration(model), []byte("broken")); err != nil {
		t.Fatal(err)
	}
	run(t, js, cfg, r)
	natstest.Until(t, "the gate has been shut for some probes", func() bool { return asked.Load() > 3 })
	if done, deadLetters := r.count(); done != 0 || deadLetters != 0 {
		t.Errorf("%d events and %d dead letters have a verdict while nothing can be committed", done, deadLetters)
	}
	r.mu.Lock()
	tried := len(r.handled)
	r.mu.Unlock()
	if tried > cfg.MaxInFlight {
		t.Errorf("%d events were pulled, at most %d may be in flight", tried, cfg.MaxInFlight)
	}
	if err := testutil.GatherAndCompare(reg,
		strings.NewReader(`# HELP decuwatch_pulling_paused 1 while no messages are pulled because a dependency is away.
# TYPE decuwatch_pulling_paused gauge
decuwatch_pulling_paused 1
`), "decuwatch_pulling_paused"); err != nil {
		t.Error(err)
	}
	away.Store(false)
	r.refuse.Store(nil)
	natstest.Until(t, "the backlog drains",
		func() bool { done, deadLetters := r.count(); return done == 50 && deadLetters == 1 })
	settled(t, stream)
	for id, deliveries := range r.handled {
		if last := deliveries[len(deliveries)-1]; last.Delivered != 1 {
			t.Errorf("event %s used %d deliveries", id, last.Delivered)
		}
	}
}

// An error that itself says that a dependency is away counts as no attempt, even if the health check succeeds: a locked
// table, a full disk.
func TestUnavailableKeepsMessages(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	publish(t, js, ids("e", 20)...)
	if _, err := js.Publish(t.Context(), schema.SubjectGeneration(model), []byte("broken")); err != nil {
		t.Fatal(err)
	}
	r := newRecorder()
	full := consumers.Unavailable(errors.New("no space left on device"))
	var tries atomic.Int64
	r.handle = func(context.Context, schema.Event, schema.Delivery) error {
		if tries.Add(1) < 50 {
			return fmt.Errorf("commit verdict: %w", full)
		}
		r.refuse.Store(nil)
		return nil
	}
	r.refuse.Store(&full)
	cfg := config()
	cfg.MaxDeliver = 2
	run(t, js, cfg, r)
	natstest.Until(t, "the backlog drains",
		func() bool { done, deadLetters := r.count(); return done == 20 && deadLetters == 1 })
	settled(t, stream)
	for id, deliveries := range r.handled {
		if last := deliveries[len(deliveries)-1]; last.Delivered != 1 {
			t.Errorf("event %s used %d deliveries", id, last.Delivered)
		}
	}
}

// Heartbeats keep a message in flight for longer than AckWait.
func TestHeartbeats(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	publish(t, js, "slow")
	var beats atomic.Int64
	if _, err := s.Connect().Subscribe("$JS.ACK.>", func(m *nats.Msg) {
		if string(m.Data) == "+WPI" {
			beats.Add(1)
		}
	}); err != nil {
		t.Fatal(err)
	}
	r := newRecorder()
	release := make(chan struct{})
	r.handle = func(context.Context, schema.Event, schema.Delivery) error { <-release; return nil }
	cfg := config()
	cfg.AckWait = 900 * time.Millisecond
	run(t, js, cfg, r)
	natstest.Until(t, "heartbeats have been sent for longer than AckWait", func() bool { return beats.Load() >= 4 })
	close(release)
	settled(t, stream)
}

func TestClosedConnectionEndsRun(t *testing.T) {
	s := natstest.Start(t)
	nc := s.Connect()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ensure(t, js)
	w := run(t, js, config(), newRecorder())
	nc.Close()
	err = <-w.err
	w.err <- err
	if !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("Run returned %v", err)
	}
}

// A stop waits until messages in flight have their verdict, and gives back at once those that have not.
func TestDrain(t *testing.T) {
	js := natstest.Start(t).JetStream()
	stream := ensure(t, js)
	publish(t, js, "quick", "stuck")
	r := newRecorder()
	started := make(chan string, 2)
	stopping := make(chan struct{})
	r.handle = func(ctx context.Context, ev schema.Event, _ schema.Delivery) error {
		started <- ev.ID
		if ev.ID == "stuck" {
			<-ctx.Done()
			return context.Cause(ctx)
		}
		<-stopping
		return nil
	}
	cfg := config()
	cfg.AckWait = 10 * time.Minute // it is given back, not timed out
	cfg.DrainTimeout = 200 * time.Millisecond
	w := run(t, js, cfg, r)
	<-started
	<-started
	w.stop()
	close(stopping)
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
	if !r.done["quick"] || r.done["stuck"] {
		t.Errorf("handled after the drain: %v", r.done)
	}
	next := newRecorder()
	run(t, js, cfg, next)
	settled(t, stream)
	if d := next.deliveries("stuck"); len(d) != 1 || d[0].Delivered != 2 || len(next.handled) != 1 {
		t.Errorf("the next worker was given %v", next.handled)
	}
}

// Two workers share one consumer's messages.
func TestTwoWorkersShare(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	cfg := config()
	cfg.MaxInFlight = 4
	a, b := newRecorder(), newRecorder()
	// Each waits until both have a message.
	both := make(chan struct{})
	var waiting sync.WaitGroup
	waiting.Add(2)
	go func() { waiting.Wait(); close(both) }()
	for _, r := range []*recorder{a, b} {
		var once sync.Once
		r.handle = func(context.Context, schema.Event, schema.Delivery) error {
			once.Do(waiting.Done)
			<-both
			return nil
		}
	}
	run(t, js, cfg, a)
	run(t, s.JetStream(), cfg, b)
	publish(t, js, ids("e", 100)...)
	settled(t, stream)
	for _, id := range ids("e", 100) {
		if n := len(a.deliveries(id)) + len(b.deliveries(id)); n != 1 {
			t.Errorf("event %s was handled %d times", id, n)
		}
	}
}

// Events are admitted by the rows that they cost.
func TestAdmissionByRows(t *testing.T) {
	for _, c := range []struct{ rows, most int }{{4, 2}, {1000, 1}} {
		js := natstest.Start(t).JetStream()
		stream := ensure(t, js)
		publish(t, js, ids("e", 40)...)
		r := newRecorder()
		r.rows = c.rows
		var now, most atomic.Int64
		r.handle = func(context.Context, schema.Event, schema.Delivery) error {
			n := now.Add(1)
			defer now.Add(-1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			return nil
		}
		cfg := config()
		cfg.MaxRows = 10
		run(t, js, cfg, r)
		settled(t, stream)
		if most.Load() > int64(c.most) {
			t.Errorf("%d events of %d rows were handled at once within 10 rows", most.Load(), c.rows)
		}
	}
}

func TestStreamThatWouldLoseEventsIsRefused(t *testing.T) {
	good := jetstream.StreamConfig{Name: "GENERATION", Subjects: []string{"generation.requested.>"},
		Discard: jetstream.DiscardNew}
	for _, c := range []struct {
		setting string
		change  func(*jetstream.StreamConfig)
	}{
		{"storage", func(s *jetstream.StreamConfig) { s.Storage = jetstream.MemoryStorage }},
		{"retention", func(s *jetstream.StreamConfig) { s.Retention = jetstream.WorkQueuePolicy }},
		{"discard", func(s *jetstream.StreamConfig) { s.Discard = jetstream.DiscardOld }},
		{"subjects", func(s *jetstream.StreamConfig) { s.Subjects = []string{"generation.requested." + model} }},
		{"max_msgs_per_subject", func(s *jetstream.StreamConfig) { s.MaxMsgsPerSubject = 5 }},
	} {
		t.Run(c.setting, func(t *testing.T) {
			js := natstest.Start(t).JetStream()
			sc := good
			c.change(&sc)
			if _, err := js.CreateStream(t.Context(), sc); err != nil {
				t.Fatal(err)
			}
			r := newRecorder()
			err := newRunner(t, js, config(), r).Run(t.Context())
			if !errors.Is(err, consumers.ErrStreamConfig) || !strings.Contains(err.Error(), c.setting) {
				t.Errorf("error is %v, want one that names %s", err, c.setting)
			}
		})
	}
	js := natstest.Start(t).JetStream()
	if _, err := js.CreateStream(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	if _, err := consumers.EnsureStream(t.Context(), js, consumers.StreamConfig{}); err != nil {
		t.Errorf("a stream of an operator's own was refused: %v", err)
	}
}

func TestNewStream(t *testing.T) {
	js := natstest.Start(t).JetStream()
	c := ensure(t, js).CachedInfo().Config
	if c.Storage != jetstream.FileStorage || c.Retention != jetstream.LimitsPolicy || c.Discard != jetstream.DiscardNew ||
		c.MaxMsgSize != 64<<10 || c.MaxAge != 7*24*time.Hour ||
		!c.DenyDelete || c.AllowRollup || c.MaxConsumers <= 0 {
		t.Errorf("stream is %+v", c)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, c := range []struct {
		field  string
		change func(*consumers.Config)
	}{
		{"consumers.max-in-flight", func(c *consumers.Config) { c.MaxInFlight = -1 }},
		{"consumers.ack-wait", func(c *consumers.Config) { c.AckWait = 1 }},
		{"consumers.retry-max-delay", func(c *consumers.Config) { c.RetryMaxDelay = 1 }},
		{"consumers.drain-timeout", func(c *consumers.Config) { c.DrainTimeout = -1 }},
	} {
		cfg := settings.WithDefaults(config())
		c.change(&cfg)
		if err := cfg.Check(); err == nil || !strings.Contains(err.Error(), c.field) {
			t.Errorf("error is %v, want one that names %s", err, c.field)
		}
	}
	if err := settings.WithDefaults(config()).Check(); err != nil {
		t.Error(err)
	}
	for want, models := range map[string][]string{
		"Models is empty": nil, `Models: "A"`: {"A"}, "named twice": {"a", "a"},
	} {
		cfg := config()
		cfg.Models = models
		if _, err := consumers.New(nil, nil, cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one that says %q", err, want)
		}
	}
}

// lines is a log in memory.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) count(message string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), message)
}

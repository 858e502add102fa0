package consumers_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// payload returns an event of the given model in structured mode.
func payload(t *testing.T, id, model string) []byte {
	t.Helper()
	ev := event(id)
	ev.Data.Model = model
	_, body, err := schema.Encode(ev)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// hostile returns the hostile messages for a model's subject.
func hostile(t *testing.T, model string) []natstest.Hostile {
	return natstest.HostileMessages(func(id string) []byte { return payload(t, id, model) })
}

// Each hostile message gets its one verdict in one delivery, whatever its headers say. So does each good event between
// them.
func TestHostileMessagesOnAModel(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	corpus := hostile(t, model)
	var mixed []natstest.Hostile
	for i, h := range corpus {
		mixed = append(mixed, h)
		for j := range 2 {
			mixed = append(mixed, natstest.Hostile{Name: "good", Payload: payload(t, fmt.Sprintf("good-%d-%d", i, j), model),
				Valid: true})
		}
	}
	sequences := s.PublishAllRaw(t, schema.SubjectGeneration(model), mixed)
	r := newRecorder()
	cfg := config()
	reg := prometheus.NewRegistry()
	cfg.Metrics = consumers.NewMetrics(reg, cfg.Models)
	run(t, js, cfg, r)
	settled(t, stream)
	checkHostile(t, r, mixed, sequences, schema.KindInvalid)
	if n := counter(t, reg, "decuwatch_redeliveries_total", "model", model); n != 0 {
		t.Errorf("%g messages were delivered again", n)
	}
}

// checkHostile checks that each message has one verdict. It must be a dead letter of the given kind exactly if the
// message has no valid event.
func checkHostile(t *testing.T, r *recorder, messages []natstest.Hostile, sequences []uint64,
	kind schema.DeadLetterKind) {
	t.Helper()
	handled := map[uint64]int{}
	r.mu.Lock()
	for _, deliveries := range r.handled {
		for _, d := range deliveries {
			handled[d.Sequence]++
		}
	}
	r.mu.Unlock()
	for i, m := range messages {
		l := r.deadLetter(sequences[i])
		switch {
		case m.Valid && (handled[sequences[i]] != 1 || l != nil):
			t.Errorf("%s: handled %d times, dead letter %+v", m.Name, handled[sequences[i]], l)
		case !m.Valid && (handled[sequences[i]] != 0 || l == nil):
			t.Errorf("%s: handled %d times, dead letter %+v", m.Name, handled[sequences[i]], l)
		case !m.Valid && (l.Kind != kind || string(l.Payload) != string(m.Payload)):
			t.Errorf("%s: the dead letter is of kind %s, with %d bytes; want %s, with %d", m.Name, l.Kind, len(l.Payload), kind,
				len(m.Payload))
		}
	}
}

// Hostile messages of a model without a consumer become dead letters in the order of their arrival.
func TestHostileMessagesWithoutOwner(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	ensure(t, js)
	corpus := hostile(t, "nobody")
	sequences := s.PublishAllRaw(t, schema.SubjectGeneration("nobody"), corpus)
	r := newRecorder()
	run(t, js, config(), r)
	natstest.Until(t, "each has its dead letter",
		func() bool { _, deadLetters := r.count(); return deadLetters == len(corpus) })
	for i := range corpus {
		corpus[i].Valid = false
	}
	checkHostile(t, r, corpus, sequences, schema.KindUnknownModel)
}

// Hostile messages that somebody terminated by hand become dead letters, because of the server's advisories.
func TestHostileMessagesTerminated(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	r := newRecorder()
	w := run(t, js, config(), r)
	natstest.Until(t, "the advisories are stored", func() bool {
		_, err := js.Consumer(t.Context(), consumers.AdvisoryStream("GENERATION"), "terminated-decuwatch")
		_, err2 := js.Consumer(t.Context(), "GENERATION", consumers.Durable(model))
		return errors.Join(err, err2) == nil
	})
	if err := w.wait(); err != nil {
		t.Fatal(err)
	}
	corpus := hostile(t, model)
	sequences := s.PublishAllRaw(t, schema.SubjectGeneration(model), corpus)
	terminateAll(t, s, stream, len(corpus))
	log := &lines{}
	cfg := config()
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	run(t, js, cfg, r)
	natstest.Until(t, "each has its dead letter",
		func() bool { _, deadLetters := r.count(); return deadLetters == len(corpus) })
	for i := range corpus {
		corpus[i].Valid = false
	}
	checkHostile(t, r, corpus, sequences, schema.KindGivenUp)
	natstest.Until(t, "each advisory is acknowledged", func() bool {
		c, err := js.Consumer(t.Context(), consumers.AdvisoryStream("GENERATION"), "terminated-decuwatch")
		if err != nil {
			t.Fatal(err)
		}
		info := c.CachedInfo()
		return info.NumPending == 0 && info.NumAckPending == 0
	})
	if n := log.count("advisory is tried again"); n > 0 {
		t.Errorf("advisories were tried again %d times", n)
	}
}

// terminateAll takes n messages from the model's consumer and terminates each. It uses no client that reads headers.
func terminateAll(t *testing.T, s *natstest.Server, stream jetstream.Stream, n int) {
	t.Helper()
	nc := s.Connect()
	inbox := nc.NewInbox()
	arrived := make(chan *nats.Msg, n)
	if _, err := nc.ChanSubscribe(inbox, arrived); err != nil {
		t.Fatal(err)
	}
	name := stream.CachedInfo().Config.Name
	if err := nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+name+"."+consumers.Durable(model), inbox,
		fmt.Appendf(nil, `{"batch":%d}`, n)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for range n {
		select {
		case msg := <-arrived:
			if err := nc.Publish(msg.Reply, []byte("+TERM by hand")); err != nil {
				t.Fatal(err)
			}
		case <-ctx.Done():
			t.Fatal("the messages did not come")
		}
	}
	if err := nc.FlushWithContext(ctx); err != nil {
		t.Fatal(err)
	}
}

// A message reads the same by its sequence number as it was published, whatever its headers say.
func TestHostileMessagesStored(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	ensure(t, js)
	corpus := hostile(t, model)
	sequences := s.PublishAllRaw(t, schema.SubjectGeneration(model), corpus)
	next := uint64(1)
	for i, m := range corpus {
		stored, err := consumers.ReadNext(t.Context(), js, "GENERATION", next, ">")
		if err != nil || stored.Sequence != sequences[i] || string(stored.Payload) != string(m.Payload) {
			t.Fatalf("%s: read %d with %d bytes, %v; want %d with %d", m.Name, stored.Sequence, len(stored.Payload), err,
				sequences[i], len(m.Payload))
		}
		if ev, err := stored.Decode(); (err == nil) != m.Valid {
			t.Errorf("%s: decoded as %+v, %v", m.Name, ev, err)
		}
		next = stored.Sequence + 1
	}
	if _, err := consumers.ReadNext(t.Context(), js, "GENERATION", next, ">"); !errors.Is(err,
		jetstream.ErrMsgNotFound) {
		t.Errorf("after the last message: %v", err)
	}
}

// Thousands of events whose producer sets a status header do not delay the loop that looks for unknown models.
func TestStatusHeadersDoNotStopTheBackstop(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	stream := ensure(t, js)
	const n = 9000
	messages := make([]natstest.Hostile, n)
	for i := range messages {
		messages[i] = natstest.Hostile{Header: "NATS/1.0\r\nStatus: 200\r\n\r\n",
			Payload: payload(t, fmt.Sprint("e", i), model)}
	}
	s.PublishAllRaw(t, schema.SubjectGeneration(model), messages)
	last := s.PublishRaw(t, schema.SubjectGeneration("nobody"), "NATS/1.0\r\nStatus: 404\r\n\r\n", nil)
	r := newRecorder()
	run(t, js, config(), r)
	natstest.Until(t, "the last message has its dead letter", func() bool { return r.deadLetter(last) != nil })
	settled(t, stream)
	if done, deadLetters := r.count(); done != n || deadLetters != 1 {
		t.Errorf("%d events were handled and %d dead letters written, want %d and 1", done, deadLetters, n)
	}
}

// An advisory that cannot be read is terminated: it is not delivered again.
func TestUnreadableAdvisory(t *testing.T) {
	s := natstest.Start(t)
	js := s.JetStream()
	ensure(t, js)
	r := newRecorder()
	log := &lines{}
	cfg := config()
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	run(t, js, cfg, r)
	name := consumers.AdvisoryStream("GENERATION")
	natstest.Until(t, "the advisories are stored", func() bool {
		_, err := js.Consumer(t.Context(), name, "terminated-decuwatch")
		return err == nil
	})
	subject := "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.GENERATION." + consumers.Durable(model)
	good, err := json.Marshal(map[string]any{"stream_seq": 1, "consumer": "somebody-else"})
	if err != nil {
		t.Fatal(err)
	}
	corpus := natstest.HostileMessages(func(string) []byte { return good })
	for i := range corpus {
		corpus[i].Header = strings.ReplaceAll(corpus[i].Header, "Stream: GENERATION", "Stream: "+name)
		corpus[i].Payload = corpus[i].Payload[:min(len(corpus[i].Payload), 1000)]
	}
	s.PublishAllRaw(t, subject, corpus)
	natstest.Until(t, "each is settled", func() bool {
		c, err := js.Consumer(t.Context(), name, "terminated-decuwatch")
		if err != nil {
			t.Fatal(err)
		}
		info := c.CachedInfo()
		return info.NumPending == 0 && info.NumAckPending == 0 && info.AckFloor.Consumer == uint64(len(corpus))
	})
	want := 0
	for _, m := range corpus {
		if string(m.Payload) != string(good) {
			want++
		}
	}
	if n := log.count("advisory cannot be read"); n != want {
		t.Errorf("%d advisories could not be read, want %d", n, want)
	}
}

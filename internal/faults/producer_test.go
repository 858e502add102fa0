package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
)

// source is the CloudEvents source of the producer's events.
const source = "//producer/faults"

// kind is what a message of the producer is, which decides its verdict.
type kind string

const (
	good         kind = "good"          // a score
	repeat       kind = "repeat"        // publishes an event again: no further verdict
	clash        kind = "clash"         // two messages share an id: one score, one dead letter duplicate_id
	broken       kind = "broken"        // breaks the format: a dead letter invalid
	unknownClass kind = "unknown_class" // a dead letter unknown_class
	unknownModel kind = "unknown_model" // a dead letter unknown_model
	poison       kind = "given_up"      // ends every worker that takes it: a dead letter given_up
)

// sent is one message that the stream acknowledged.
type sent struct {
	kind     kind
	id       string // of the event; "" if the message is not an event
	field    string // that a broken message breaks
	sequence uint64
}

// producer publishes, and keeps a log of what the stream acknowledged. A run is compared with that log.
type producer struct {
	t   testing.TB
	js  jetstream.JetStream
	rng *rand.Rand
	// address is the server's address, for messages that no client would write.
	address string

	publishing sync.Mutex
	next       int
	latest     *nats.Msg // of the good event that was published last

	mu    sync.Mutex
	log   []sent
	maybe map[string]bool // ids that were published and not acknowledged
}

func newProducer(t testing.TB, js jetstream.JetStream, seed uint64) *producer {
	return &producer{t: t, js: js, rng: rand.New(rand.NewPCG(seed, 2)), maybe: map[string]bool{}}
}

// count returns how many messages the stream has acknowledged.
func (p *producer) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.log)
}

// sent returns the log.
func (p *producer) sent() []sent {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]sent(nil), p.log...)
}

// event returns the next good event.
func (p *producer) event() schema.Event {
	p.next++
	return schema.Event{
		Source: source, ID: fmt.Sprintf("e%06d", p.next), Time: time.Now(),
		Data: schema.Generation{Model: model, Class: schema.ClassIndex(p.rng.IntN(4)), Seed: p.rng.Uint64()},
	}
}

// message returns the message of an event.
func (p *producer) message(ev schema.Event) *nats.Msg {
	header, payload, err := schema.Encode(ev)
	if err != nil {
		p.t.Errorf("encode: %v", err)
	}
	return &nats.Msg{Subject: schema.SubjectGeneration(ev.Data.Model), Header: header, Data: payload}
}

// publish publishes n messages of all kinds, most of them good.
func (p *producer) publish(n int) {
	for range n {
		p.publishing.Lock()
		switch draw := p.rng.IntN(100); {
		case draw < 6 && p.latest != nil:
			p.again()
		case draw < 10:
			p.clash()
		case draw < 18:
			p.broken()
		case draw < 21:
			ev := p.event()
			ev.Data.Class = schema.ClassIndex(99)
			p.send(p.message(ev), sent{kind: unknownClass, id: ev.ID})
		default:
			p.good()
		}
		p.publishing.Unlock()
	}
}

// publishGood publishes n good events.
func (p *producer) publishGood(n int) {
	p.publishing.Lock()
	defer p.publishing.Unlock()
	for range n {
		p.good()
	}
}

func (p *producer) good() {
	ev := p.event()
	p.latest = p.message(ev)
	p.send(p.latest, sent{kind: good, id: ev.ID})
}

// again publishes the latest event once more. The stream does not recognize it as a duplicate.
func (p *producer) again() {
	p.next++
	m := &nats.Msg{Subject: p.latest.Subject, Data: p.latest.Data, Header: nats.Header{}}
	m.Header["Content-Type"] = p.latest.Header["Content-Type"]
	m.Header.Set(schema.HeaderMessageID, fmt.Sprintf("again %d", p.next))
	p.send(m, sent{kind: repeat})
}

// clash publishes two events with one id.
func (p *producer) clash() {
	ev := p.event()
	for i := range 2 {
		ev.Data.Seed++
		m := p.message(ev)
		m.Header.Set(schema.HeaderMessageID, fmt.Sprintf("clash %s %d", ev.ID, i))
		p.send(m, sent{kind: clash, id: ev.ID})
	}
}

// broken publishes a message that breaks the format.
func (p *producer) broken() {
	b := corpus[p.rng.IntN(len(corpus))]
	p.next++
	m := &nats.Msg{Subject: schema.SubjectGeneration(model), Data: []byte(b.payload), Header: nats.Header{}}
	m.Header.Set("Content-Type", "application/cloudevents+json")
	m.Header.Set(schema.HeaderMessageID, fmt.Sprintf("broken %d", p.next))
	p.send(m, sent{kind: broken, field: b.field})
}

// poison publishes a good event that will end its workers, and returns its id.
func (p *producer) poison() string {
	p.publishing.Lock()
	defer p.publishing.Unlock()
	ev := p.event()
	ev.ID = "poison-" + ev.ID
	p.send(p.message(ev), sent{kind: poison, id: ev.ID})
	return ev.ID
}

// send publishes a message until the stream acknowledges it, and logs it.
func (p *producer) send(m *nats.Msg, s sent) {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		ack, err := p.js.PublishMsg(ctx, m)
		cancel()
		p.mu.Lock()
		if err == nil {
			s.sequence = ack.Sequence
			p.log = append(p.log, s)
			delete(p.maybe, s.id)
		} else if s.id != "" {
			p.maybe[s.id] = true
		}
		p.mu.Unlock()
		if err == nil || p.t.Context().Err() != nil {
			return
		}
		time.Sleep(20 * time.Millisecond) // the server is away: that is the fault
	}
}

// valid is the payload of an event; breaking returns it with one part replaced.
var valid = `{"specversion":"1.0","type":"` + schema.TypeGenerationRequested + `","source":"` + source +
	`","id":"x","time":"` + time.Now().UTC().Format(time.RFC3339) +
	`","datacontenttype":"application/json","data":{"model":"tiny","class":0,"seed":1}}`

func breaking(old, new string) string {
	changed := strings.Replace(valid, old, new, 1)
	if changed == valid {
		panic("the event does not hold " + old)
	}
	return changed
}

// corpus has payloads that break the format, and the field that their dead letter names.
var corpus = []struct{ payload, field string }{
	{"", "payload"},
	{"{", "payload"},
	{"\xff\xfe", "payload"},
	{strings.Repeat("[", 60000), "payload"},
	{breaking(`"id":"x"`, `"id":1`), "id"},
	{breaking(`"1.0"`, `"0.3"`), "specversion"},
	{breaking(`"seed":1`, `"seed":-1`), "data.seed"},
	{breaking(`"seed":1`, `"seed":1,"prompt":"a cat"`), "data.prompt"},
	{breaking(`"class":0`, `"class":1e99`), "data.class"},
	{
		breaking(`"seed":1`, `"seed":1,"sampler":{"name":"ddim","steps":1000000000,"guidance_scale":1,"eta":0}`),
		"data.sampler.steps",
	},
}

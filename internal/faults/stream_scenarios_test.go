package faults

import (
	"context"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/schema"
)

func streamScenarios() []scenario {
	return []scenario{
		{
			name: "consumer-deleted", quick: true, setup: plain,
			does: "the durable consumer is deleted under load, one to three times: known events are not scored again",
			run: func(r *run) {
				r.worker()
				stop := r.load()
				for range 1 + r.rng.IntN(3) {
					if !r.working(10) {
						return
					}
					r.sleep(0, 300*time.Millisecond)
					r.eventually("delete the consumer", func(ctx context.Context) error {
						return r.js.DeleteConsumer(ctx, eventStream, consumers.Durable(model))
					})
					r.broke("consumer deleted")
				}
				stop()
				r.settle()
			},
		},
		{
			name: "stream-recreated", setup: plain,
			does: "the drained stream is deleted and made anew, so that sequences begin at 1 again: verdicts stand, new " +
				"events get theirs",
			run: func(r *run) {
				w := r.worker()
				r.producer.publish(30)
				if !r.drained(deadline) {
					return
				}
				old := r.producer.take()
				r.eventually("delete the stream", func(ctx context.Context) error { return r.js.DeleteStream(ctx, eventStream) })
				r.makeStream()
				r.broke("the stream was deleted and made anew")
				r.watch.stop()
				r.producer.publishGood(30)
				r.within(deadline, "the new events have their verdicts", func() bool {
					f, err := r.look()
					return err == nil && len(r.missing(f)) == 0
				})
				if !w.running() {
					r.violate("the worker has ended: %s", w.tail(500))
				}
				f := r.lookUntil()
				for _, s := range append(old, r.producer.sent()...) {
					if s.kind == good && len(f.verdicts[s.id]) != 1 {
						r.violate("event %s has the verdicts %v", s.id, f.verdicts[s.id])
					}
				}
				if code, said := r.reconcile(); code != 0 {
					r.violate("reconcile has exit code %d: %s", code, said)
				}
			},
		},
		{
			name: "stream-purged", setup: plain,
			does: "messages without a verdict are purged: reconcile names what is gone",
			run: func(r *run) {
				w := r.worker()
				r.producer.publishGood(20)
				if !r.drained(deadline) {
					return
				}
				w.kill()
				r.producer.publishGood(20)
				lost := 1 + r.rng.IntN(10)
				r.eventually("purge", func(ctx context.Context) error {
					s, err := r.js.Stream(ctx, eventStream)
					if err != nil {
						return err
					}
					return s.Purge(ctx, jetstream.WithPurgeSequence(21+uint64(lost))) //nolint:gosec // small
				})
				r.broke("the first %d of 20 messages without a verdict are purged", lost)
				r.worker()
				if !r.idle() {
					return
				}
				f := r.lookUntil()
				if n := len(r.missing(f)); n != lost {
					r.violate("%d verdicts are missing, %d messages were purged", n, lost)
				}
				if code, said := r.reconcile(); code != 3 {
					r.violate("%d messages are gone without a verdict, and reconcile has exit code %d: %s", lost, code, said)
				}
			},
		},
		{
			name: "unknown-model", setup: plain,
			does: "events of a model that nobody scores, among good ones: a dead letter each",
			run: func(r *run) {
				r.worker()
				r.producer.publish(10)
				r.producer.orphan(3)
				r.producer.publish(10)
				r.broke("3 events of an unknown model")
				r.settle()
			},
		},
		{
			name: "model-removed", setup: plain,
			does: "a durable consumer stays after its model left the configuration: its events are reported until they " +
				"have a verdict",
			run: func(r *run) {
				r.worker()
				r.producer.publish(20)
				r.eventually("make the durable", func(ctx context.Context) error {
					_, err := r.js.CreateConsumer(ctx, eventStream, jetstream.ConsumerConfig{
						Durable: consumers.Durable("gone"), FilterSubject: schema.SubjectGeneration("gone"),
						AckPolicy: jetstream.AckExplicitPolicy,
					})
					return err
				})
				if !r.drained(deadline) {
					return
				}
				r.eventually("publish to the model that is gone", func(ctx context.Context) error {
					ev := r.producer.event()
					ev.Data.Model = "gone"
					_, err := r.js.PublishMsg(ctx, r.producer.message(ev))
					return err
				})
				r.broke("an event for a durable that nobody pulls from")
				// An orphaned event is reported or becomes a dead letter.
				r.within(deadline, "reconcile reports the orphaned event, or it has a dead letter", func() bool {
					letters, err := r.query("SELECT kind FROM decuwatch.dead_letters WHERE subject LIKE '%.gone'")
					if err != nil {
						return false
					}
					code, _ := r.reconcile()
					return len(letters) == 1 && code == 0 || len(letters) == 0 && code != 0
				})
			},
		},
		{
			name: "poison", quick: true, setup: plain,
			does: "hostile headers, malformed header blocks and the corpus of broken payloads among good events: one " +
				"dead letter each, in one delivery; reconcile ends",
			run: func(r *run) {
				r.flags = with(r.flags, "--consumers.ack-wait=30s")
				r.producer.publishGood(5)
				for _, i := range r.rng.Perm(len(hostile)) {
					r.producer.raw(hostile[i])
					r.producer.publishGood(1)
				}
				r.producer.publish(40)
				r.broke("%d hostile header blocks", len(hostile))
				r.worker()
				r.settle()
				again, err := r.query("SELECT sequence::text FROM decuwatch.dead_letters WHERE delivered > 1")
				if err != nil || len(again) > 0 {
					r.violate("messages %v took more than one delivery: %v", again, err)
				}
			},
		},
		{
			name: "rolling-upgrade", setup: plain,
			does: "a worker of the version before works beside the new one on the new tables, or refuses to start " +
				"(-old, OLD=REVISION)",
			run: func(r *run) {
				if *flagOld == "" {
					r.t.Fatal("give the binary of the version before: make faults OLD=REVISION")
				}
				stop := r.load()
				old := r.workerOf(*flagOld)
				r.within(30*time.Second, "the older worker serves or has ended", func() bool {
					return old.address() != "" || !old.running()
				})
				r.worker()
				if !r.working(40) {
					return
				}
				r.broke("two versions at work; the older one serves: %t", old.running())
				r.sleep(500*time.Millisecond, 2*time.Second)
				old.signal(15)
				old.exit(20 * time.Second)
				stop()
				r.settle()
			},
		},
	}
}

// hostileMessage is a message whose headers mislead readers.
type hostileMessage struct {
	header    string // the header block, byte by byte
	valid     bool   // the payload is a good event, and the headers do not matter to it
	empty     bool   // no payload
	malformed bool   // no client can read the block
}

// hostile has headers that clients take for a status of the server, and header blocks that they cannot read.
var hostile = func() []hostileMessage {
	var list []hostileMessage
	for _, h := range []string{
		"NATS/1.0\r\nStatus: 404\r\n\r\n", "NATS/1.0\r\nStatus: 408\r\n\r\n",
		"NATS/1.0\r\nStatus: 409\r\nDescription: Consumer Deleted\r\n\r\n",
		"NATS/1.0\r\nStatus: 100\r\n\r\n", "NATS/1.0\r\nStatus: 200\r\n\r\n",
		"NATS/1.0\r\nNats-Pending-Messages: 5\r\nStatus: 100\r\n\r\n",
		"NATS/1.0 404 No Messages\r\n\r\n", "NATS/1.0 503\r\n\r\n", "NATS/1.0\r\nNats-Msg-Size: 7\r\n\r\n",
	} {
		list = append(list, hostileMessage{header: h, empty: true}, hostileMessage{header: h, valid: true})
	}
	for _, h := range []string{
		"NATS/1.0\r\nno colon here\r\n\r\n", "NATS/1.0\r\n: no name\r\n\r\n", "NATS/1.0\r\n\x00\xff: x\r\n\r\n",
	} {
		_, err := nats.DecodeHeadersMsg([]byte(h))
		list = append(list, hostileMessage{header: h, malformed: err != nil})
	}
	return list
}()

// raw publishes a message with a header block that no client would write.
func (p *producer) raw(h hostileMessage) {
	p.publishing.Lock()
	defer p.publishing.Unlock()
	s := sent{kind: broken}
	payload := []byte("{")
	switch {
	case h.empty:
		payload = nil
	case h.valid:
		ev := p.event()
		s = sent{kind: good, id: ev.ID}
		payload = p.message(ev).Data
		// A good event needs its content type.
		h.header = strings.Replace(h.header, "\r\n", "\r\nContent-Type: application/cloudevents+json\r\n", 1)
	}
	s.field = "payload"
	if h.malformed {
		s.field = "headers"
	}
	sequence, err := publishRaw(p.address, schema.SubjectGeneration(model), h.header, payload)
	if err != nil {
		p.t.Errorf("publish %q: %v", h.header, err)
		return
	}
	s.sequence = sequence
	p.mu.Lock()
	p.log = append(p.log, s)
	p.mu.Unlock()
}

// take empties the log and returns it.
func (p *producer) take() []sent {
	p.mu.Lock()
	defer p.mu.Unlock()
	log := p.log
	p.log = nil
	return log
}

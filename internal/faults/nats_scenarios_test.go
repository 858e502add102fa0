package faults

import (
	"context"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

func natsScenarios() []scenario {
	return []scenario{
		{
			name: "nats-killed", quick: true, kill: true, setup: killable,
			does: "SIGKILL of nats-server under load one to three times, down for up to 2 s each",
			run: func(r *run) {
				r.worker()
				stop := r.load()
				for range 1 + r.rng.IntN(3) {
					if !r.working(10) {
						return
					}
					r.sleep(0, 500*time.Millisecond)
					r.nats.Kill()
					down := r.between(0, 2*time.Second)
					time.Sleep(down) // the length of the fault
					r.nats.Restart()
					r.broke("SIGKILL of nats-server, back after %s", down.Round(time.Millisecond))
				}
				stop()
				r.settle()
				r.objects()
			},
		},
		{
			name: "nats-leader-killed", quick: true, kill: true,
			does: "SIGKILL of the stream's leader in a cluster of three, one to three times, under load",
			setup: func(t *testing.T) *servers {
				return &servers{
					cluster:  natstest.StartClusterWith(t, natstest.Options{Process: true, SyncAlways: true}),
					database: anyDatabase(t),
				}
			},
			run: func(r *run) {
				r.worker()
				stop := r.load()
				for range 1 + r.rng.IntN(3) {
					if !r.working(10) {
						return
					}
					r.sleep(0, 500*time.Millisecond)
					leader := r.cluster.StreamLeader(eventStream)
					leader.Kill()
					down := r.between(0, 3*time.Second)
					time.Sleep(down) // the length of the fault
					leader.Restart()
					r.broke("SIGKILL of the stream's leader, back after %s", down.Round(time.Millisecond))
				}
				stop()
				r.settle()
			},
		},
		{
			name: "nats-cut", quick: true, kill: true, setup: plain,
			does: "the network between worker and NATS swallows one direction for up to 2 s, then is cut: two to five times",
			run: func(r *run) {
				r.worker()
				stop := r.load()
				for range 2 + r.rng.IntN(4) {
					if !r.working(10) {
						return
					}
					fromWorker, d := r.rng.IntN(2) == 0, r.between(10*time.Millisecond, 2*time.Second)
					r.natsProxy.silence(fromWorker, d)
					r.broke("NATS hears nothing of the worker (%t) or it nothing of NATS for %s, then cut", fromWorker,
						d.Round(time.Millisecond))
				}
				stop()
				r.settle()
			},
		},
		{
			name: "nats-full-disk",
			does: "JetStream's file system is full (a tmpfs of 48 MB; needs root): publishing is refused and the worker is " +
				"not ready; after room is made and the server restarted, everything that was acknowledged drains",
			setup: func(t *testing.T) *servers {
				dir := tmpfs(t, "48m")
				return &servers{
					nats:     natstest.StartWith(t, natstest.Options{Process: true, SyncAlways: true, Dir: dir}),
					database: anyDatabase(t),
					small:    true,
				}
			},
			run: func(r *run) {
				w := r.worker()
				stop := r.load()
				if !r.working(10) {
					return
				}
				ballast := fill(r.t, r.nats.StoreDir())
				r.broke("JetStream's file system is full")
				r.notReady(w)
				r.sleep(0, 3*time.Second)
				if err := os.Remove(ballast); err != nil {
					r.t.Fatal(err)
				}
				r.nats.Restart()
				r.mend()
				stop()
				r.settle()
				r.readyAgain(w)
			},
		},
		{
			name: "stream-full", setup: plain,
			does: "the stream of events is full (max_bytes): producers are refused, nothing that was acknowledged is lost",
			run: func(r *run) {
				full := r.limitStream(64 << 10)
				refused := 0
				for range 400 { // not by the producer, which would try until it succeeds
					m := r.producer.message(r.producer.event())
					m.Subject = schema.SubjectGeneration("filler")
					ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
					if _, err := r.js.PublishMsg(ctx, m); err != nil {
						refused++
					}
					cancel()
				}
				if refused == 0 {
					r.violate("a stream of 64 KiB took 400 messages")
				}
				r.broke("the stream is full, %d messages were refused", refused)
				r.eventually("empty the stream of the filler", func(ctx context.Context) error {
					s, err := r.js.Stream(ctx, eventStream)
					if err != nil {
						return err
					}
					return s.Purge(ctx, jetstream.WithPurgeSubject(schema.SubjectGeneration("filler")))
				})
				full()
				r.worker()
				r.producer.publish(50)
				r.settle()
			},
		},
		{
			name: "alerts-refused", quick: true, setup: plain,
			does: "publishing alerts fails for longer than the stream's duplicate window, in both directions: each " +
				"alert arrives",
			run: func(r *run) {
				r.eventually("make the stream of alerts", func(ctx context.Context) error {
					_, err := r.js.CreateStream(ctx, jetstream.StreamConfig{
						Name: alertStream, Subjects: []string{"uncertainty.>"}, Storage: jetstream.FileStorage,
						Duplicates: 100 * time.Millisecond,
					})
					return err
				})
				r.worker()
				r.producer.publish(20)
				answers := r.rng.IntN(2) == 0
				var asked sync.Map // subjects on which publishers wait for answers
				r.natsProxy.setHook(func(f *frame) (bool, func()) {
					if f.fromClient && strings.HasPrefix(f.text, "uncertainty.alert.") {
						asked.Store(f.reply, true)
						return !answers, nil
					}
					_, answer := asked.Load(f.text)
					return answer && !f.fromClient, nil
				})
				if !r.working(10) {
					return
				}
				r.sleep(3*time.Second, 7*time.Second)
				r.natsProxy.setHook(nil)
				r.broke("alerts are lost on their way, or the answers to them (%t)", answers)
				r.settle()
			},
		},
		{
			name: "api-refused", setup: plain,
			does: "requests to JetStream's API (CONSUMER.NAMES, CONSUMER.LIST, CONSUMER.INFO, STREAM.MSG.GET) get no " +
				"answer for 20 s, with events of a model that nobody scores: nothing is acknowledged on ignorance",
			run: func(r *run) {
				apis := []string{"CONSUMER.NAMES", "CONSUMER.LIST", "CONSUMER.INFO", "STREAM.MSG.GET", "STREAM.INFO"}
				r.worker()
				r.producer.publish(20)
				if !r.working(5) {
					return
				}
				// At once, or after the first look at the list of owners.
				r.sleep(0, 2*time.Second)
				r.producer.orphan(3)
				r.sleep(0, 9*time.Second)
				dropped := map[string]bool{}
				for range 1 + r.rng.IntN(len(apis)) {
					dropped["$JS.API."+apis[r.rng.IntN(len(apis))]+"."+eventStream] = true
				}
				r.natsProxy.setHook(func(f *frame) (bool, func()) {
					for api := range dropped {
						if f.fromClient && strings.HasPrefix(f.text, api) {
							return true, nil
						}
					}
					return false, nil
				})
				r.sleep(15*time.Second, 20*time.Second)
				r.natsProxy.setHook(nil)
				r.broke("no answer from %v", slices.Sorted(maps.Keys(dropped)))
				r.producer.publish(20)
				r.settle()
			},
		},
		{
			name: "nats-restored", setup: killable,
			does: "nats-server is restored from a copy of its store that is some events old, by the steps of " +
				"docs/operating.md: reconcile names what is gone before, I after, and nothing is scored again",
			run: restoreNATS,
		},
		{
			name: "nats-bit-flip", setup: killable,
			does: "a bit flips in a block file of the stopped server: I, or reconcile names what is gone",
			run:  flipBit,
		},
	}
}

// orphan publishes n good events of a model that nobody scores.
func (p *producer) orphan(n int) {
	p.publishing.Lock()
	defer p.publishing.Unlock()
	for range n {
		ev := p.event()
		ev.Data.Model = "nobody"
		p.send(p.message(ev), sent{kind: unknownModel, id: ev.ID})
	}
}

// limitStream limits the size of the stream of events, and returns a function that removes the limit.
func (r *run) limitStream(bytes int64) (unlimit func()) {
	set := func(bytes int64) int64 {
		var old int64
		r.eventually("bound the stream", func(ctx context.Context) error {
			s, err := r.js.Stream(ctx, eventStream)
			if err != nil {
				return err
			}
			c := s.CachedInfo().Config
			old, c.MaxBytes = c.MaxBytes, bytes
			_, err = r.js.UpdateStream(ctx, c)
			return err
		})
		return old
	}
	old := set(bytes)
	return func() { set(old) }
}

// idle waits until the consumer has no waiting events, and no alert is owed.
func (r *run) idle() bool {
	r.t.Helper()
	return r.within(deadline, "nothing waits at the consumer", func() bool {
		waiting, err := r.waiting()
		return err == nil && waiting == ""
	})
}

// restoreNATS restores the server's store to a copy. Events that were acknowledged after the copy are gone from the
// stream. They have their verdict if a worker took them before.
func restoreNATS(r *run) {
	w := r.worker()
	r.producer.publish(40)
	if !r.drained(deadline) {
		return
	}
	r.producer.publish(5)
	w.kill()
	r.nats.Stop()
	dir := r.nats.StoreDir()
	backup := filepath.Join(r.t.TempDir(), "store")
	if err := os.CopyFS(backup, os.DirFS(dir)); err != nil {
		r.t.Fatal(err)
	}
	r.nats.Restart()
	w = r.worker()
	r.producer.publish(30)
	if !r.drained(deadline) {
		return
	}
	before := r.scored()
	w.kill()
	r.nats.Stop()
	if err := os.RemoveAll(dir); err != nil {
		r.t.Fatal(err)
	}
	if err := os.CopyFS(dir, os.DirFS(backup)); err != nil {
		r.t.Fatal(err)
	}
	r.nats.Restart()
	r.broke("nats-server was restored from a copy from before the last 30 messages")
	// Their alerts are gone from the stream.
	if code, said := r.reconcile(); code != 3 {
		r.violate("alerts are gone from their stream, and reconcile has exit code %d: %s", code, said)
	}
	r.afterRestore()
	r.worker()
	verb(r.t, 0, "republish", "--yes", "--nats.url="+r.natsURL, "--postgres.url="+r.postgresURL)
	r.settle()
	if after := r.scored(); after != before {
		r.violate("%d scores before the restore and %d after", before, after)
	}
}

// flipBit flips one bit of a message block. The server may drop that message, or all messages after it. Verdicts must
// stay, and what is gone without a verdict must be reported.
func flipBit(r *run) {
	w := r.worker()
	r.producer.publish(30)
	if !r.drained(deadline) {
		return
	}
	w.kill()
	r.producer.publishGood(20) // these wait
	r.nats.Stop()
	var blocks []string
	err := filepath.WalkDir(r.nats.StoreDir(), func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".blk") && strings.Contains(path, "/"+eventStream+"/msgs/") {
			blocks = append(blocks, path)
		}
		return err
	})
	if err != nil || len(blocks) == 0 {
		r.t.Fatalf("blocks %v: %v", blocks, err)
	}
	path := blocks[r.rng.IntN(len(blocks))]
	body, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	at, bit := r.rng.IntN(len(body)), r.rng.IntN(8)
	body[at] ^= 1 << bit
	if err := os.WriteFile(path, body, 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.nats.Restart()
	r.broke("bit %d of byte %d of %d in %s flipped", bit, at, len(body), filepath.Base(path))
	r.worker()
	r.idle()
	r.watch.stop()
	f := r.lookUntil()
	missing := r.missing(f)
	if code, said := r.reconcile(); len(missing) > 0 && code == 0 {
		r.violate("reconcile agrees although %d things are gone: %v: %s", len(missing), missing, said)
	}
}

package faults

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

func workerScenarios() []scenario {
	return []scenario{
		{
			name: "worker-killed", quick: true, kill: true, setup: plain,
			does: "SIGKILL of the worker one to four times, each at a stage of an event's life or at a random time",
			run: func(r *run) {
				for range 1 + r.rng.IntN(4) {
					r.producer.publish(25)
					w := r.worker()
					r.killAt(w)
				}
				r.worker()
				r.settle()
				r.objects()
			},
		},
		{
			name: "worker-terminated", quick: true, kill: true, setup: plain,
			does: "SIGTERM under load, one to three times: exit code 0 within the drain timeout, redelivered is at most " +
				"what was in flight",
			run: func(r *run) {
				r.flags = with(r.flags, "--consumers.ack-wait=30s")
				stop := r.load()
				times := 1 + r.rng.IntN(3)
				for range times {
					w := r.worker()
					if !r.working(10) {
						return
					}
					r.sleep(0, 300*time.Millisecond)
					r.terminate(w)
				}
				stop()
				r.worker()
				r.settle()
				if most := times * inFlight; r.redelivered > most {
					r.violate("%d events were delivered again, at most %d were in flight", r.redelivered, most)
				}
			},
		},
		{
			name: "worker-frozen", quick: true, kill: true, setup: plain,
			does: "SIGSTOP for longer than AckWait while another worker goes on, then SIGCONT: the late write changes nothing",
			run: func(r *run) {
				stop := r.load()
				frozen := r.worker()
				if !r.working(10) {
					return
				}
				r.sleep(0, 300*time.Millisecond)
				frozen.signal(syscall.SIGSTOP)
				r.worker()
				if !r.working(20) {
					return
				}
				r.sleep(1500*time.Millisecond, 3*time.Second)
				frozen.signal(syscall.SIGCONT)
				r.broke("SIGSTOP of one of two workers for longer than AckWait")
				stop()
				r.producer.publish(20)
				r.settle()
				if !frozen.running() {
					r.violate("the worker that was frozen has ended: %s", frozen.tail(500))
				}
			},
		},
		{
			name: "two-workers", quick: true, setup: plain,
			does: "two workers, relays and patrols at the same time; every event is in the stream twice: one row, one alert",
			run: func(r *run) {
				r.worker()
				r.worker()
				for range 40 {
					r.producer.publishGood(1)
					r.producer.publishing.Lock()
					r.producer.again()
					r.producer.publishing.Unlock()
				}
				r.broke("every event is published twice, to two workers")
				r.settle()
				r.objects()
			},
		},
		{
			name: "two-ensembles", setup: plain,
			does: "two workers score one model with different ensembles: one of them says that it is not ready and names both",
			run:  twoEnsembles,
		},
		{
			name: "crash-loop", quick: true, setup: plain,
			does: "an event ends every worker that takes it, and a supervisor starts the next: its neighbors are " +
				"scored, and it becomes a dead letter",
			run: crashLoop,
		},
		{
			name: "no-descriptors", setup: plain,
			does: "the worker may open no more files for a while (RLIMIT_NOFILE), with connections cut: it goes on after",
			run: func(r *run) {
				stop := r.load()
				w := r.worker()
				if !r.working(10) {
					return
				}
				restore := r.limit(w, rlimitNoFile, 3)
				r.natsProxy.cut()
				r.postgresProxy.cut()
				r.broke("no file descriptors, connections cut")
				r.sleep(2*time.Second, 4*time.Second)
				restore()
				r.mend()
				stop()
				r.settle()
				if !w.running() {
					r.violate("the worker has ended: %s", w.tail(500))
				}
			},
		},
		{
			name: "no-memory", setup: plain,
			does: "the worker may take no more memory (RLIMIT_AS) and may die of it; another is started: I after the restart",
			run: func(r *run) {
				stop := r.load()
				w := r.worker()
				if !r.working(10) {
					return
				}
				restore := r.limit(w, rlimitAS, 1<<20)
				r.broke("no more address space")
				r.sleep(3*time.Second, 6*time.Second)
				restore()
				r.mend()
				if !w.running() {
					r.worker()
				}
				stop()
				r.settle()
			},
		},
	}
}

// crashLoop publishes one event among others that kills each worker as soon as its score would be written.
func crashLoop(r *run) {
	r.producer.publishGood(20 + r.rng.IntN(10))
	poison := r.producer.poison()
	r.producer.publishGood(20)
	var mu sync.Mutex
	var current *process
	r.postgresProxy.setHook(func(f *frame) (bool, func()) {
		if !f.fromClient || !strings.Contains(f.text, "INSERT INTO decuwatch.scores") ||
			!strings.Contains(string(f.body), poison) {
			return false, nil
		}
		mu.Lock()
		defer mu.Unlock()
		current.signal(syscall.SIGKILL)
		return true, nil
	})
	const atMost = 40
	for deaths := 0; ; deaths++ {
		mu.Lock()
		current = r.worker()
		w := current
		mu.Unlock()
		if r.died(w, poison) {
			r.broke("a worker died of the event")
			if deaths == atMost {
				r.violate("%d workers died of one event", deaths)
				return
			}
			continue
		}
		break
	}
	r.postgresProxy.setHook(nil)
	r.settle()
}

// died waits until a worker has died, or the event that kills it has its dead letter.
func (r *run) died(w *process, id string) bool {
	r.t.Helper()
	dead := false
	r.within(deadline, "the worker dies of the event, or the event is given up", func() bool {
		if !w.running() {
			dead = true
			return true
		}
		letters, err := r.query("SELECT kind FROM decuwatch.dead_letters WHERE event_id = '" + id + "'")
		return err == nil && len(letters) == 1
	})
	return dead
}

// twoEnsembles starts a second worker with another ensemble of the same name.
func twoEnsembles(r *run) {
	first := r.worker()
	stop := r.load()
	if !r.working(10) {
		return
	}
	other := r.t.TempDir()
	if err := os.CopyFS(other, os.DirFS(tiny)); err != nil {
		r.t.Fatal(err)
	}
	manifest, err := os.OpenFile(filepath.Join(other, "ensemble.json"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	_, err = manifest.WriteString("\n") // the same numbers under another digest
	if err := errors.Join(err, manifest.Close()); err != nil {
		r.t.Fatal(err)
	}
	verb(r.t, 0, "thresholds", "set", other, "--measurement=class_gap", "--value=1e-12", "--reason=every score fires",
		"--by=faults", "--postgres.url="+r.postgresURL)
	r.ensemble = other
	second := r.worker()
	r.broke("a second worker scores the model with another ensemble")
	if !r.working(20) {
		return
	}
	r.within(time.Minute, "a worker reports the other one's ensemble", func() bool {
		for _, w := range []*process{first, second} {
			if ready, said := w.ready(); !ready && strings.Contains(said, "is scored here with ensemble") {
				return true
			}
		}
		return false
	})
	r.terminate(second)
	stop()
	r.settle()
	r.readyAgain(first)
}

// inFlight is the value of consumers.max-in-flight in workerFlags.
const inFlight = 16

// terminate stops a worker, and expects it to end within the drain timeout of workerFlags and a margin.
func (r *run) terminate(w *process) {
	r.t.Helper()
	began := time.Now()
	w.signal(syscall.SIGTERM)
	const drain, margin = 10 * time.Second, 5 * time.Second
	code := w.exit(drain + margin)
	r.broke("SIGTERM, exit code %d after %s", code, time.Since(began).Round(time.Millisecond))
	switch code {
	case 0:
	case -2:
		r.violate("the worker still runs %s after SIGTERM", drain+margin)
		w.kill()
	default:
		r.violate("exit code %d after SIGTERM: %s", code, w.tail(1000))
	}
}

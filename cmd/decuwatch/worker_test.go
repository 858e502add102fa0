package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// Workers are real child processes that run the tiny ensemble. Tests compare the producer's own log with Postgres and
// the stream of alerts (bench.check). Faults are injected in internal/faults.

const (
	faultModel    = "tiny"
	faultEnsemble = "../../scoring/testdata/tiny"
	faultSource   = "//producer/faults"
)

// bench is the view of one producer on the servers of a test.
type bench struct {
	t       *testing.T
	natsURL string // for workers; the test's own connection goes past any proxy
	pgURL   string // for workers
	js      jetstream.JetStream
	store   *postgres.Store
	db      string // for the test
	pool    *pgxpool.Pool
	flags   []string

	mu   sync.Mutex
	good map[string]bool // ids of events that the stream acknowledged
	next atomic.Int64
}

// newBench returns a bench on the given servers, with a threshold that every score exceeds.
func newBench(t *testing.T, natsURL, pgURL string) *bench {
	t.Helper()
	b := &bench{t: t, natsURL: natsURL, pgURL: pgURL, db: pgURL, good: map[string]bool{}}
	b.flags = []string{
		"--consumers.ack-wait=1s", "--consumers.max-in-flight=16", "--consumers.retry-delay=50ms",
		"--consumers.retry-max-delay=500ms", "--consumers.drain-timeout=20s",
		"--postgres.commit-timeout=2s", "--postgres.lock-timeout=1s",
		// Every alert is sent, and only scores raise alerts.
		"--volume.class-per-hour=0", "--volume.model-per-hour=0", "--patrol.run-length=1e300",
	}
	js, err := jetstream.New(natstest.Connect(t, natsURL))
	if err != nil {
		t.Fatal(err)
	}
	b.js = js
	b.open()
	digest, settings := tinyProfile(t)
	_, err = b.store.SetThreshold(t.Context(), schema.Threshold{
		Model: faultModel, EnsembleDigest: digest, Settings: settings,
		Measurement: schema.ClassGap, Scope: schema.ScopeModel, Severity: schema.SeverityWarn, Value: 1e-12,
		Origin: "manual", SetBy: "faults_test", Reason: "every score fires",
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// open connects the test's own store.
func (b *bench) open() {
	b.t.Helper()
	store, err := postgres.Open(b.t.Context(), postgres.Config{URL: b.db, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(store.Close)
	b.store = store
	if b.pool, err = pgxpool.New(b.t.Context(), b.db); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(b.pool.Close)
}

// tinyProfile returns the digest and the settings of the tiny ensemble.
var tinyProfile = func() func(*testing.T) (digest, settings string) {
	load := sync.OnceValues(func() ([2]string, error) {
		engine, err := scoring.Open(faultEnsemble, scoring.Options{Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return [2]string{}, err
		}
		found := [2]string{engine.Ensemble().Digest, engine.Profile().Settings()}
		return found, engine.Close()
	})
	return func(t *testing.T) (string, string) {
		t.Helper()
		found, err := load()
		if err != nil {
			t.Fatal(err)
		}
		return found[0], found[1]
	}
}()

// worker is a child process that runs decuwatch serve.
type worker struct {
	t     *testing.T
	cmd   *exec.Cmd
	log   string
	ended chan struct{}
}

// set gives workers that start from now on another value of a setting.
func (b *bench) set(name, value string) {
	b.flags = slices.DeleteFunc(b.flags, func(f string) bool { return strings.HasPrefix(f, "--"+name+"=") })
	b.flags = append(b.flags, "--"+name+"="+value)
}

// patient is an AckWait that outlasts every pause of a slow machine, for tests that count deliveries.
const patient = "1m"

// worker starts a worker with env added to its environment.
func (b *bench) worker(env ...string) *worker {
	b.t.Helper()
	args := append([]string{
		"serve", "-e", faultEnsemble, "--nats.url=" + b.natsURL, "--postgres.url=" + b.pgURL,
		"--metrics.address=127.0.0.1:0", "--review.address=none", "--review.workers=0", "--scoring.threads=1",
	}, b.flags...)
	return start(b.t, env, args...)
}

func start(t *testing.T, env []string, args ...string) *worker {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return starting(t, func(args ...string) *exec.Cmd { return exec.Command(exe, args...) }, env, args...)
}

// starting is like start, with a command that becomes the program.
func starting(t *testing.T, command func(args ...string) *exec.Cmd, env []string, args ...string) *worker {
	t.Helper()
	dir := t.TempDir()
	w := &worker{t: t, log: filepath.Join(dir, "log"), ended: make(chan struct{})}
	log, err := os.Create(w.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	w.cmd = command(args...)
	w.cmd.Env = append(append(os.Environ(), mainEnv+"=1"), env...)
	w.cmd.Stdout, w.cmd.Stderr = log, log
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = w.cmd.Wait() // its state is read below
		close(w.ended)
	}()
	t.Cleanup(func() {
		_ = w.cmd.Process.Signal(syscall.SIGCONT)
		_ = w.cmd.Process.Kill()
		<-w.ended
		if t.Failed() {
			t.Logf("%s: ...%s", strings.Join(args[:1], " "), w.tail())
		}
	})
	return w
}

// tail returns the end of the log.
func (w *worker) tail() string {
	text, err := os.ReadFile(w.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4000):])
}

// wait waits until the process has ended.
func (w *worker) wait() *os.ProcessState {
	w.t.Helper()
	select {
	case <-w.ended:
	case <-time.After(2 * time.Minute):
		w.t.Fatalf("process %d still runs", w.cmd.Process.Pid)
	}
	return w.cmd.ProcessState
}

func (w *worker) signal(s syscall.Signal) {
	w.t.Helper()
	if err := w.cmd.Process.Signal(s); err != nil {
		w.t.Fatal(err)
	}
}

// stop asks the process to end and expects exit code 0.
func (w *worker) stop() {
	w.t.Helper()
	w.signal(syscall.SIGTERM)
	if state := w.wait(); state.ExitCode() != 0 {
		w.t.Errorf("after SIGTERM: %s\n%s", state, w.tail())
	}
}

// publish publishes n events, each as often as it takes until the stream acknowledges it.
func (b *bench) publish(n int) {
	b.t.Helper()
	for range n {
		i := b.next.Add(1)
		ev := schema.Event{
			Source: faultSource, ID: fmt.Sprintf("e%06d", i), Time: time.Now(),
			//nolint:gosec // small numbers
			Data: schema.Generation{Model: faultModel, Class: schema.ClassIndex(int(i % 4)), Seed: uint64(i)},
		}
		for {
			ctx, cancel := context.WithTimeout(b.t.Context(), 2*time.Second)
			_, err := schema.Publish(ctx, b.js, ev)
			cancel()
			if err == nil {
				break
			}
			if b.t.Context().Err() != nil {
				return
			}
		}
		b.mu.Lock()
		b.good[ev.ID] = true
		b.mu.Unlock()
	}
}

// stream creates the stream of events as a worker would.
func (b *bench) stream() {
	b.t.Helper()
	if _, err := consumers.EnsureStream(b.t.Context(), b.js, consumers.StreamConfig{}); err != nil {
		b.t.Fatal(err)
	}
}

// until waits for a condition, for at most three minutes.
func (b *bench) until(what string, condition func() bool) {
	b.t.Helper()
	for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if condition() {
			return
		}
	}
	b.t.Fatalf("not so after 3m: %s", what)
}

// drained waits until each message is acknowledged and each alert is sent.
func (b *bench) drained() {
	b.t.Helper()
	ctx := b.t.Context()
	b.until("every message is acknowledged and every alert sent", func() bool {
		c, err := b.js.Consumer(ctx, "GENERATION", consumers.Durable(faultModel))
		if err != nil {
			return false
		}
		if info := c.CachedInfo(); info.NumPending != 0 || info.NumAckPending != 0 {
			return false
		}
		owed, err := b.store.OutboxStats(ctx)
		return err == nil && len(owed) == 0
	})
}

// scored returns how many scores there are.
func (b *bench) scored() int {
	b.t.Helper()
	n := 0
	for _, row := range b.query("SELECT count(*)::text FROM decuwatch.scores") {
		n, _ = strconv.Atoi(row)
	}
	return n
}

// query returns the first column of a result. Postgres may be away for a moment.
func (b *bench) query(sql string) []string {
	b.t.Helper()
	var list []string
	b.until("Postgres answers", func() bool {
		ctx, cancel := context.WithTimeout(b.t.Context(), 10*time.Second)
		defer cancel()
		rows, err := b.pool.Query(ctx, sql)
		if err != nil {
			return false
		}
		list, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err == nil
	})
	return list
}

// check compares what the producer knows with Postgres and the stream of alerts.
func (b *bench) check() {
	b.t.Helper()
	b.drained()
	b.mu.Lock()
	defer b.mu.Unlock()

	verdicts := map[string]int{}
	for _, row := range b.query(`SELECT event_id FROM decuwatch.scores UNION ALL SELECT event_id FROM decuwatch.skips
		UNION ALL SELECT event_id FROM decuwatch.dead_letters WHERE kind <> 'invalid'`) {
		verdicts[row]++
	}
	for id := range b.good {
		if verdicts[id] != 1 {
			b.t.Errorf("event %s has %d verdicts", id, verdicts[id])
		}
	}
	for id := range verdicts {
		if !b.good[id] {
			b.t.Errorf("event %s has a verdict, but the producer never had it acknowledged", id)
		}
	}
	dead := b.query("SELECT sequence || ' ' || field FROM decuwatch.dead_letters WHERE kind = 'invalid'")
	if len(dead) > 0 {
		b.t.Errorf("messages became dead letters: %v", dead)
	}

	digest, _ := tinyProfile(b.t)
	wanted := map[string]bool{}
	for _, id := range b.query("SELECT event_id FROM decuwatch.scores") {
		wanted[alerts.ID(faultSource, id, digest, schema.ClassGap)] = true
	}
	stored := b.query("SELECT id FROM decuwatch.alerts WHERE kind = 'score'")
	if len(stored) != len(wanted) {
		b.t.Errorf("%d alerts on scores are stored, %d scores reached the threshold", len(stored), len(wanted))
	}
	for _, id := range stored {
		if !wanted[id] {
			b.t.Errorf("alert %s is of no stored score", id)
		}
	}
	// This includes alerts that are not about one score, such as class drift. They may still be on their way.
	b.until("the stream holds the alerts that Postgres holds, by id", func() bool {
		published := slices.Sorted(maps.Keys(b.published()))
		stored := b.query("SELECT id FROM decuwatch.alerts")
		slices.Sort(stored)
		return slices.Equal(stored, published)
	})

	if w := start(b.t, nil, "reconcile", "--nats.url="+b.natsURL, "--postgres.url="+b.pgURL); w.wait().ExitCode() != 0 {
		b.t.Errorf("reconcile: %s\n%s", w.cmd.ProcessState, w.tail())
	}
	b.t.Logf("%d events, %d alerts", len(b.good), len(stored))
}

// published returns how often each alert is in the stream.
func (b *bench) published() map[string]int {
	b.t.Helper()
	ctx := b.t.Context()
	found := map[string]int{}
	b.until("the stream of alerts is read", func() bool {
		stream, err := b.js.Stream(ctx, "UNCERTAINTY")
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return true // no alert ever
		}
		if err != nil {
			return false
		}
		info, err := stream.Info(ctx)
		if err != nil {
			return false
		}
		found = map[string]int{}
		for sequence := info.State.FirstSeq; sequence <= info.State.LastSeq; sequence++ {
			msg, err := stream.GetMsg(ctx, sequence)
			if err != nil {
				return false
			}
			found[msg.Header.Get(schema.HeaderMessageID)]++
		}
		return true
	})
	return found
}

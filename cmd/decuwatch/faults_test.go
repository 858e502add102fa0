package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
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

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring"
)

// The fault matrix. Each test runs decuwatch as real child processes with the tiny ensemble through the real engine,
// breaks something while the producer publishes, mends it, waits until the backlog has drained by itself, and holds
// the producer's own log against Postgres and the stream of alerts (bench.check): every acknowledged event has exactly
// one verdict, and every score its one alert, by id, in both places.

// faultRounds multiplies the kills of TestKilledAtEachStage.
var faultRounds = func() int {
	if n, err := strconv.Atoi(os.Getenv("DECUWATCH_FAULT_ROUNDS")); err == nil && n > 0 {
		return n
	}
	return 1
}()

const (
	faultModel    = "tiny"
	faultEnsemble = "../../scoring/testdata/tiny"
	faultSource   = "//producer/faults"
)

// bench is one producer's view of the servers that a test breaks.
type bench struct {
	t       *testing.T
	natsURL string // for workers; the test's own connection goes past any proxy
	pgURL   string // for workers
	js      jetstream.JetStream
	store   *postgres.Store
	db      string // for the test
	pool    *pgxpool.Pool
	flags   []string

	mu     sync.Mutex
	good   map[string]bool   // ids of events that the stream acknowledged
	broken map[uint64]string // sequence numbers of broken messages that the stream acknowledged, and the field that is broken
	next   atomic.Int64
}

// newBench returns a bench on the given servers, with a threshold that every score reaches.
func newBench(t *testing.T, natsURL, pgURL string) *bench {
	t.Helper()
	b := &bench{t: t, natsURL: natsURL, pgURL: pgURL, db: pgURL, good: map[string]bool{}, broken: map[uint64]string{}}
	b.flags = []string{
		"--consumers.ack-wait=1s", "--consumers.max-in-flight=16", "--consumers.retry-delay=50ms",
		"--consumers.retry-max-delay=500ms", "--consumers.drain-timeout=20s", "--postgres.commit-timeout=2s", "--postgres.lock-timeout=1s",
		// Every alert is sent, and there are no others than those on scores.
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
		Model: faultModel, EnsembleDigest: digest, Settings: settings, Measurement: schema.ClassGap, Scope: alerts.ScopeModel,
		Severity: schema.SeverityWarn, Value: 1e-12, Origin: "manual", SetBy: "faults_test", Reason: "every score fires",
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
		engine, err := scoring.Open(scoring.Options{Ensemble: faultEnsemble, Log: slog.New(slog.DiscardHandler)})
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

// set has workers started from here on use another value of a setting.
func (b *bench) set(name, value string) {
	b.flags = slices.DeleteFunc(b.flags, func(f string) bool { return strings.HasPrefix(f, "--"+name+"=") })
	b.flags = append(b.flags, "--"+name+"="+value)
}

// patient is an AckWait that no pause of a slow machine outlasts, for tests that count deliveries.
const patient = "1m"

// worker starts one; env is added to its environment.
func (b *bench) worker(env ...string) *worker {
	b.t.Helper()
	args := append([]string{
		"serve", "-e", faultEnsemble, "--nats.url=" + b.natsURL, "--postgres.url=" + b.pgURL, "--metrics.address=127.0.0.1:0", "--review.address=none", "--review.workers=0", "--scoring.threads=1",
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

// starting is start with a command that becomes the program.
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

// publish has the stream acknowledge n events, however often that takes.
func (b *bench) publish(n int) {
	b.t.Helper()
	for range n {
		i := b.next.Add(1)
		ev := schema.Event{
			Source: faultSource, ID: fmt.Sprintf("e%06d", i), Time: time.Now(),
			Data: schema.Generation{Model: faultModel, Class: schema.ClassIndex(int(i % 4)), Seed: uint64(i)}, //nolint:gosec // small
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

// publishBroken has the stream acknowledge a message that breaks the format in a field.
func (b *bench) publishBroken(payload, field string) {
	b.t.Helper()
	ack, err := b.js.Publish(b.t.Context(), schema.SubjectGeneration(faultModel), []byte(payload))
	if err != nil {
		b.t.Fatal(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.broken[ack.Sequence] = field
}

// load publishes until the returned function is called, no more than about a hundred events ahead of the scores.
func (b *bench) load() (stop func()) {
	b.t.Helper()
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			scores := 0
			err := b.pool.QueryRow(b.t.Context(), "SELECT count(*) FROM decuwatch.scores").Scan(&scores)
			b.mu.Lock()
			ahead := len(b.good) - scores
			b.mu.Unlock()
			if err == nil && ahead < 100 {
				b.publish(10)
			}
		}
	}()
	stop = sync.OnceFunc(func() { close(end); <-ended })
	b.t.Cleanup(stop)
	return stop
}

// stream creates the stream of events as a worker would.
func (b *bench) stream() {
	b.t.Helper()
	if _, err := consumers.EnsureStream(b.t.Context(), b.js, consumers.Config{Models: []string{faultModel}}); err != nil {
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

// check holds what the producer knows against Postgres and the stream of alerts: invariant I.
func (b *bench) check() {
	b.t.Helper()
	b.drained()
	b.mu.Lock()
	defer b.mu.Unlock()

	verdicts := map[string]int{}
	for _, row := range b.query("SELECT event_id FROM decuwatch.scores UNION ALL SELECT event_id FROM decuwatch.skips UNION ALL SELECT event_id FROM decuwatch.dead_letters WHERE kind <> 'invalid'") {
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
	letters := map[string]int{}
	for _, row := range b.query("SELECT sequence || ' ' || field FROM decuwatch.dead_letters WHERE kind = 'invalid'") {
		letters[row]++
	}
	for sequence, field := range b.broken {
		if key := fmt.Sprintf("%d %s", sequence, field); letters[key] != 1 {
			b.t.Errorf("broken message %s has %d dead letters; all are %v", key, letters[key], slices.Collect(maps.Keys(letters)))
		}
	}
	if len(letters) != len(b.broken) {
		b.t.Errorf("%d messages became dead letters, %d were broken", len(letters), len(b.broken))
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
	// With those that are about no single score, which may still be on their way: a class's drift, for one.
	b.until("the stream holds the alerts that Postgres holds, by id", func() bool {
		published := slices.Sorted(maps.Keys(b.published()))
		stored := b.query("SELECT id FROM decuwatch.alerts")
		slices.Sort(stored)
		return slices.Equal(stored, published)
	})

	if w := start(b.t, nil, "reconcile", "--nats.url="+b.natsURL, "--postgres.url="+b.pgURL); w.wait().ExitCode() != 0 {
		b.t.Errorf("reconcile: %s\n%s", w.cmd.ProcessState, w.tail())
	}
	b.t.Logf("%d events, %d broken messages, %d alerts", len(b.good), len(b.broken), len(stored))
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

// proxy puts a proxy before an address and returns it with its own.
func proxy(t *testing.T, upstream string) *toxiproxy.Proxy {
	t.Helper()
	log := zerolog.New(io.Discard)
	api := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), log)
	p := toxiproxy.NewProxy(api, "fault", "127.0.0.1:0", upstream)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}

// silence has a proxy swallow what one side sends, then cuts the connections and lets all pass again.
func silence(t *testing.T, p *toxiproxy.Proxy, direction string, d time.Duration) {
	t.Helper()
	toxic := fmt.Sprintf(`{"name":"silence","type":"timeout","stream":%q,"attributes":{"timeout":0}}`, direction)
	if _, err := p.Toxics.AddToxicJson(strings.NewReader(toxic)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(d) // the length of the fault, not a wait for something
	if err := p.Toxics.RemoveToxic(context.Background(), "silence"); err != nil {
		t.Fatal(err)
	}
}

var _ = toxics.TimeoutToxic{} // the kind of toxic that silence names

func TestKilledAtEachStage(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	kills := 0
	for round := range faultRounds {
		for _, stage := range failpoints() {
			for _, n := range []int{1, 2 + rand.IntN(14)} {
				b.publish(20)
				if stage == failBuried {
					for range n {
						b.publishBroken("{", "payload")
					}
				}
				w := b.worker(fmt.Sprintf("DECUWATCH_FAILPOINT=%s:%d", stage, n))
				state := w.wait()
				if status, ok := state.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
					t.Fatalf("round %d, %s:%d: %s\n%s", round, stage, n, state, w.tail())
				}
				kills++
			}
		}
	}
	w := b.worker()
	b.check()
	w.stop()
	if n := b.scored(); n != len(b.good) {
		t.Errorf("%d of %d events are scored", n, len(b.good))
	}
	t.Logf("%d kills", kills)
}

func TestTerminatedUnderLoad(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	b.set("consumers.ack-wait", "10s")
	stop := b.load()
	const times, inFlight = 3, 16
	for range times {
		before := b.scored()
		w := b.worker()
		b.until("the worker is at work", func() bool { return b.scored() > before+20 })
		w.stop()
	}
	stop()
	w := b.worker()
	b.check()
	w.stop()
	if again := b.query("SELECT event_id FROM decuwatch.events WHERE delivered > 1"); len(again) > times*inFlight {
		t.Errorf("%d events were delivered again, at most %d were in flight", len(again), times*inFlight)
	}
}

func TestFrozenBeyondAckWait(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	b.publish(50)
	frozen := b.worker()
	b.until("the worker is at work", func() bool { return b.scored() == 50 })
	stop := b.load()
	b.until("the worker is under load", func() bool { return b.scored() > 70 })
	frozen.signal(syscall.SIGSTOP)
	other := b.worker()
	stop()
	b.drained() // what the frozen one held too, after AckWait
	scores := b.scored()
	frozen.signal(syscall.SIGCONT)
	b.publish(20)
	b.check()
	if n := b.scored(); n != scores+20 {
		t.Errorf("%d scores, %d before the frozen worker went on and 20 events after", n, scores)
	}
	frozen.stop()
	other.stop()
}

func TestNATSKilledUnderLoad(t *testing.T) {
	s := natstest.StartWith(t, natstest.Options{Process: true, SyncAlways: true})
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	w := b.worker()
	stop := b.load()
	for range 3 {
		before := b.scored()
		b.until("the worker is at work", func() bool { return b.scored() > before+20 })
		s.Kill()
		s.Restart()
	}
	stop()
	b.check()
	w.stop()
}

// postgresServer is a server of the test's own on a port that it keeps.
func postgresServer(t *testing.T) (url string, kill, restart func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "faults")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	options := local.Options{Dir: dir, Port: natstest.FreePort(t)}
	var server *local.Server
	restart = func() {
		var err error
		if server, err = local.Start(context.Background(), options); err != nil {
			t.Fatal(err)
		}
	}
	kill = func() { server.Kill() }
	restart()
	t.Cleanup(func() { server.Kill() })
	if err := postgres.Migrate(t.Context(), server.URL()); err != nil {
		t.Fatal(err)
	}
	return server.URL(), kill, restart
}

func TestPostgresKilledUnderLoad(t *testing.T) {
	url, kill, restart := postgresServer(t)
	s := natstest.Start(t)
	b := newBench(t, s.URL(), url)
	b.stream()
	w := b.worker()
	stop := b.load()
	for range 2 {
		before := b.scored()
		b.until("the worker is at work", func() bool { return b.scored() > before+20 })
		kill()
		// It is away for as long as it takes to publish some more.
		b.publish(50)
		restart()
	}
	stop()
	b.check()
	w.stop()
	if n := b.scored(); n != len(b.good) {
		t.Errorf("%d of %d events are scored", n, len(b.good))
	}
	// What was in flight was kept: an outage uses up no delivery.
	if again := b.query("SELECT event_id FROM decuwatch.events WHERE delivered > 1"); len(again) > 0 {
		t.Logf("%d events were delivered again", len(again))
	}
}

// The answer to a commit is lost, again and again: what was committed is found, and nothing is acknowledged that was
// not.
func TestCommitsAnswerLost(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	p := behind(t, &b.pgURL)
	w := b.worker()
	stop := b.load()
	for i := range 6 {
		before := b.scored()
		b.until("the worker is at work", func() bool { return b.scored() > before+10 })
		silence(t, p, []string{"downstream", "upstream"}[i%2], 100*time.Millisecond)
	}
	stop()
	b.check()
	w.stop()
	if n := b.scored(); n != len(b.good) {
		t.Errorf("%d of %d events are scored", n, len(b.good))
	}
}

// behind puts a proxy before the server of a URL and has the URL name the proxy.
func behind(t *testing.T, url *string) *toxiproxy.Proxy {
	t.Helper()
	scheme, rest, ok := strings.Cut(*url, "://")
	if !ok {
		t.Fatalf("%q is not a URL", *url)
	}
	user, rest, ok := strings.Cut(rest, "@")
	if !ok {
		user, rest = "", user
	} else {
		user += "@"
	}
	address, path, _ := strings.Cut(rest, "/")
	if _, _, err := net.SplitHostPort(address); err != nil {
		t.Fatal(err)
	}
	p := proxy(t, address)
	*url = strings.TrimSuffix(scheme+"://"+user+p.Listen+"/"+path, "/")
	return p
}

// Acknowledgements and the answers to them are lost, and alerts cannot be published for longer than the stream's
// duplicate window.
func TestNetworkToNATSCut(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	if _, err := b.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "UNCERTAINTY", Subjects: []string{"uncertainty.>"}, Duplicates: 100 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	p := behind(t, &b.natsURL)
	w := b.worker()
	stop := b.load()
	for i := range 4 {
		before := b.scored()
		b.until("the worker is at work", func() bool { return b.scored() > before+10 })
		silence(t, p, []string{"upstream", "downstream"}[i%2], 1500*time.Millisecond)
	}
	stop()
	b.check()
	w.stop()
}

// A table is locked for longer than a commit may take: nothing is lost, nothing becomes a dead letter, and what the
// worker has in hand uses up no delivery. A message that the server sends in the moment in which pulling is paused may
// reach nobody, and comes again.
func TestTableLocked(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	const inHand = 16 // newBench's consumers.max-in-flight
	b.set("consumers.max-deliver", "2")
	b.set("consumers.ack-wait", patient)
	w := b.worker()
	b.publish(20)
	b.drained()
	conn, err := pgx.Connect(t.Context(), b.db)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE decuwatch.events IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	b.publish(40)
	b.until("pulling is paused", func() bool { return strings.Count(w.tail(), "pulling is paused") >= 2 })
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	b.check()
	w.stop()
	if n := b.scored(); n != 60 {
		t.Errorf("%d of 60 events are scored", n)
	}
	if again := b.query("SELECT event_id FROM decuwatch.events WHERE delivered > 1"); len(again) >= inHand {
		t.Errorf("events %v were delivered again", again)
	}
	if n := b.query("SELECT kind FROM decuwatch.dead_letters"); len(n) > 0 {
		t.Errorf("dead letters %v", n)
	}
}

// Broken messages become dead letters in one delivery while their neighbours are scored; an identifier used for two
// events keeps the first.
func TestPoison(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	_, valid, err := schema.Encode(schema.Event{Source: faultSource, ID: "x", Time: time.Now(), Data: schema.Generation{Model: faultModel, Class: schema.ClassIndex(0), Seed: 1}})
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range [][3]string{
		{"{", "", "payload"},
		{`"id":"x"`, `"id":1`, "id"},
		{`"specversion":"1.0"`, `"specversion":"0.3"`, "specversion"},
		{`"time":`, `"extra":{},"time":`, "extra"},
		{`"seed":1`, `"seed":1,"sampler":{"name":"ddim","steps":1000000000,"guidance_scale":1,"eta":0}`, "data.sampler.steps"},
		{`"seed":1`, `"seed":1,"sampler":{"name":"ddim","steps":10,"guidance_scale":31,"eta":0}`, "data.sampler.guidance_scale"},
		{`"seed":1`, `"seed":-1`, "data.seed"},
		{`"seed":1`, `"seed":1,"prompt":"a cat"`, "data.prompt"},
		{`"class":0`, `"class":1e99`, "data.class"},
		{`"model":"tiny"`, `"model":"other"`, "data.model"},
		{string(valid), strings.Repeat("[", 60000), "payload"},
		{string(valid), "\xff\xfe", "payload"},
	} {
		payload := strings.Replace(string(valid), c[0], c[1], 1)
		if i == 0 {
			payload = c[0]
		} else if payload == string(valid) {
			t.Fatalf("%s does not hold %s", valid, c[0])
		}
		if c[2] == "data.model" {
			continue // decodes; below
		}
		b.publishBroken(payload, c[2])
		b.publish(3)
	}
	// A class that the ensemble does not have is found when the event is scored, and so names the event.
	unknown := schema.Event{Source: faultSource, ID: "unknown-class", Time: time.Now(), Data: schema.Generation{Model: faultModel, Class: schema.ClassIndex(99), Seed: 1}}
	first := schema.Event{Source: faultSource, ID: "twice", Time: time.Now(), Data: schema.Generation{Model: faultModel, Class: schema.ClassIndex(1), Seed: 1}}
	for _, ev := range []schema.Event{unknown, first} {
		if _, err := schema.Publish(t.Context(), b.js, ev); err != nil {
			t.Fatal(err)
		}
		b.good[ev.ID] = true
	}
	b.set("consumers.ack-wait", patient)
	w := b.worker()
	b.drained()
	second := first
	second.Data.Seed = 2
	_, payload, err := schema.Encode(second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.js.Publish(t.Context(), schema.SubjectGeneration(faultModel), payload); err != nil {
		t.Fatal(err)
	}
	b.until("the second event of one id is buried", func() bool {
		return len(b.query("SELECT 1::text FROM decuwatch.dead_letters WHERE kind = 'duplicate_id' AND field = 'id' AND event_id = 'twice'")) == 1
	})
	if n := b.query("SELECT seed::text FROM decuwatch.scores WHERE event_id = 'twice'"); len(n) != 1 || n[0] != "1" {
		t.Errorf("seeds of the scores of the id used twice: %v, want the first event's", n)
	}
	if n := b.query("SELECT field FROM decuwatch.dead_letters WHERE kind = 'unknown_class' AND event_id = 'unknown-class'"); len(n) != 1 || n[0] != "data.class" {
		t.Errorf("fields of the unknown class's dead letters: %v", n)
	}
	if n := b.query("SELECT delivered::text FROM decuwatch.dead_letters WHERE delivered > 1"); len(n) > 0 {
		t.Errorf("%d broken messages took more than one delivery", len(n))
	}
	w.stop()
	if w := start(t, nil, "reconcile", "--nats.url="+b.natsURL, "--postgres.url="+b.pgURL); w.wait().ExitCode() != 0 {
		t.Errorf("reconcile: %s\n%s", w.cmd.ProcessState, w.tail())
	}
	letters := b.query("SELECT sequence || ' ' || field FROM decuwatch.dead_letters WHERE kind = 'invalid' ORDER BY sequence")
	for sequence, field := range b.broken {
		if !slices.Contains(letters, fmt.Sprintf("%d %s", sequence, field)) {
			t.Errorf("no dead letter %d %s in %v", sequence, field, letters)
		}
	}
	if n := b.scored(); n != len(b.good)-1 {
		t.Errorf("%d of %d neighbours are scored", n, len(b.good)-1)
	}
}

// Events whose workers end before their verdict are handled once more, alone, so that those which one poisonous event
// takes down with it get their verdict. One that ends its worker then too becomes a dead letter and is not tried for
// ever.
func TestCrashLoop(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	b.set("consumers.max-deliver", "2") // being killed is no failure
	// The consumers, those of advisories included, stand before anything can go wrong.
	first := b.worker()
	b.publish(1)
	b.drained()
	first.stop()

	crash := func() {
		t.Helper()
		w := b.worker("DECUWATCH_FAILPOINT=" + failDelivered)
		if status, ok := w.wait().Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Fatalf("%s\n%s", w.cmd.ProcessState, w.tail())
		}
	}
	b.publish(10)
	crash()
	crash()
	w := b.worker()
	b.check()
	w.stop()
	if n := b.scored(); n != 11 {
		t.Errorf("%d of 11 events are scored, two of whose workers were killed", n)
	}

	b.publish(1)
	for range 6 { // twice among others, once among few, three times alone
		crash()
	}
	w = b.worker("DECUWATCH_FAILPOINT=" + failDelivered) // it is not handled again
	b.until("the event is buried", func() bool {
		return len(b.query("SELECT 1::text FROM decuwatch.dead_letters WHERE kind = 'given_up' AND event_id = 'e000012'")) == 1
	})
	b.check()
	w.stop()
	if n := b.scored(); n != 11 {
		t.Errorf("%d events are scored, want 11", n)
	}
}

// Two workers share the work; the same event forced to both yields one row.
func TestTwoWorkers(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	first, second := b.worker(), b.worker()
	b.publish(100)
	// Each event once more, as messages of their own: without Nats-Msg-Id, beyond the stream's own deduplication.
	stream, err := b.js.Stream(t.Context(), "GENERATION")
	if err != nil {
		t.Fatal(err)
	}
	for sequence := range uint64(100) {
		msg, err := stream.GetMsg(t.Context(), sequence+1)
		if err != nil {
			t.Fatal(err)
		}
		msg.Header.Del(schema.HeaderMessageID)
		if _, err := b.js.PublishMsg(t.Context(), &nats.Msg{Subject: msg.Subject, Header: msg.Header, Data: msg.Data}); err != nil {
			t.Fatal(err)
		}
	}
	b.check()
	first.stop()
	second.stop()
}

func TestClusterLosesItsLeader(t *testing.T) {
	c := natstest.StartCluster(t)
	b := newBench(t, c.URL(), pgtest.URL(t))
	b.flags = append(b.flags, "--stream.replicas=3", "--alerts.replicas=3")
	w := b.worker()
	b.until("the worker has made its streams", func() bool {
		for _, name := range []string{"GENERATION", "UNCERTAINTY"} {
			if _, err := b.js.Stream(t.Context(), name); err != nil {
				return false
			}
		}
		return true
	})
	stop := b.load()
	b.until("the worker is at work", func() bool { return b.scored() > 20 })
	c.StreamLeader("GENERATION").Kill()
	before := b.scored()
	b.until("the worker is at work again", func() bool { return b.scored() > before+50 })
	stop()
	b.check()
	w.stop()
}

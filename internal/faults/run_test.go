package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/scoring/ort/ortfault"
)

const (
	model = "tiny"
	tiny  = "../../scoring/testdata/tiny"

	eventStream = "GENERATION"
	alertStream = "UNCERTAINTY"

	smallStream = 8 << 20 // bytes of each stream on a small disk
)

// servers are shared by the runs of one scenario.
type servers struct {
	nats     *natstest.Server
	cluster  *natstest.Cluster // instead of nats
	database *database
	shim     *ortfault.Shim // for scenarios that break the device
	small    bool           // NATS has a small disk
}

// shared has the servers that several scenarios share, because none of them breaks them for longer than a run.
// TestFaults resets it.
var shared struct {
	nats     *natstest.Server // inside this process
	process  *natstest.Server // a child that flushes before it acknowledges, as in deploy/nats
	database *database
	shim     *ortfault.Shim
}

// plain returns servers that no scenario kills. They end with the test t, after the scenarios.
func plain(t *testing.T) *servers {
	t.Helper()
	if shared.nats == nil {
		shared.nats = natstest.Start(t)
	}
	return &servers{nats: shared.nats, database: anyDatabase(t)}
}

// killable returns a nats-server that can be killed and restarted.
func killable(t *testing.T) *servers {
	t.Helper()
	if shared.process == nil {
		shared.process = natstest.StartWith(t, natstest.Options{Process: true, SyncAlways: true})
	}
	return &servers{nats: shared.process, database: anyDatabase(t)}
}

// shimmed returns servers, and an ONNX Runtime that breaks on demand.
func shimmed(t *testing.T) *servers {
	t.Helper()
	s := plain(t)
	if shared.shim == nil {
		shared.shim = ortfault.New(t)
	}
	s.shim = shared.shim
	return s
}

// anyDatabase returns the database server, which is never killed.
func anyDatabase(t *testing.T) *database {
	t.Helper()
	if shared.database == nil {
		shared.database = startDatabase(t, "", throwaway())
	}
	return shared.database
}

// run is one run of a scenario: workers, a producer, and what breaks between them.
type run struct {
	*servers
	t    *testing.T
	seed uint64
	rng  *rand.Rand // of the faults

	natsURL, postgresURL     string // without a proxy
	natsProxy, postgresProxy *proxy // for the workers; natsProxy is nil with a cluster
	js                       jetstream.JetStream
	pool                     *pgxpool.Pool
	ensemble                 string
	flags                    []string
	replicas                 int
	producer                 *producer
	watch                    *watcher

	mu         sync.Mutex
	faults     []string
	violations []string

	mended      time.Time // when the last fault ended
	drain       time.Duration
	redelivered int
	alerts      int
}

func newRun(t *testing.T, on *servers, seed uint64) *run {
	t.Helper()
	r := &run{servers: on, t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1))}
	r.ensemble, r.flags, r.replicas = tiny, workerFlags(), 1
	if on.cluster != nil {
		r.natsURL, r.replicas = on.cluster.URL(), 3
		r.flags = append(r.flags, "--stream.replicas=3", "--alerts.replicas=3")
	} else {
		r.natsURL = on.nats.URL()
		r.natsProxy = natsProxy(t, on.nats.Address())
	}
	if on.small {
		bytes := strconv.Itoa(smallStream)
		r.flags = append(r.flags, "--stream.max-bytes="+bytes, "--alerts.max-bytes="+bytes)
	}
	var err error
	if r.js, err = jetstream.New(natstest.Connect(t, r.natsURL)); err != nil {
		t.Fatal(err)
	}
	r.postgresURL = on.database.fresh(t)
	r.postgresProxy = postgresProxy(t, on.database.server.Address())
	r.connect(r.postgresURL)
	r.wipe()
	r.makeStream()
	r.producer = newProducer(t, r.js, seed)
	if on.nats != nil {
		r.producer.address = on.nats.Address()
	}
	r.watch, r.mended = r.newWatcher(), time.Now()
	return r
}

// connect opens the run's own connections to the database.
func (r *run) connect(address string) {
	r.t.Helper()
	pool, err := pgxpool.New(context.Background(), address)
	if err != nil {
		r.t.Fatal(err)
	}
	r.pool = pool
	r.t.Cleanup(pool.Close)
}

// wipe removes the streams of an earlier run.
func (r *run) wipe() {
	r.t.Helper()
	for _, name := range []string{eventStream, alertStream, consumers.AdvisoryStream(eventStream)} {
		r.eventually("remove stream "+name, func(ctx context.Context) error {
			if err := r.js.DeleteStream(ctx, name); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
				return err
			}
			return nil
		})
	}
}

// makeStream creates the stream of events as a worker would.
func (r *run) makeStream() {
	r.t.Helper()
	r.eventually("make the stream", func(ctx context.Context) error {
		c := consumers.StreamConfig{Replicas: r.replicas}
		if r.small {
			c.MaxBytes = smallStream
		}
		_, err := consumers.EnsureStream(ctx, r.js, c)
		return err
	})
}

// eventually retries what succeeds on a healthy server.
func (r *run) eventually(what string, try func(ctx context.Context) error) {
	r.t.Helper()
	var err error
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		err = try(ctx)
		cancel()
		if err == nil {
			return
		}
	}
	r.t.Fatalf("%s: not done after %s: %v", what, deadline, err)
}

// worker starts a worker behind the proxies.
func (r *run) worker(env ...string) *process {
	r.t.Helper()
	return r.workerOf(decuwatch, env...)
}

func (r *run) workerOf(binary string, env ...string) *process {
	r.t.Helper()
	nats := r.natsURL
	if r.natsProxy != nil {
		nats = "nats://" + r.natsProxy.address()
	}
	postgres := through(r.t, r.postgresURL, r.postgresProxy.address())
	args := append([]string{"serve", "-e", r.ensemble, "--nats.url=" + nats, "--postgres.url=" + postgres}, r.flags...)
	return start(r.t, binary, env, args...)
}

// verb runs a verb to its end and expects an exit code.
func verb(t testing.TB, want int, args ...string) {
	t.Helper()
	p := start(t, decuwatch, nil, args...)
	if got := p.exit(deadline); got != want {
		t.Fatalf("decuwatch %s: exit code %d, want %d: %s", args[0], got, want, p.tail(2000))
	}
}

// broke records a fault.
func (r *run) broke(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, fmt.Sprintf(format, args...))
	r.mended = time.Now()
}

// mend records that the last fault is over, if it lasted for a time.
func (r *run) mend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mended = time.Now()
}

const maxViolations = 12 // that are described

// violate records a violation.
func (r *run) violate(format string, args ...any) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	text := strings.TrimSpace(fmt.Sprintf(format, args...))
	r.violations = append(r.violations, text)
	if len(r.violations) <= maxViolations {
		r.t.Errorf("%s", text)
	}
}

// within waits for a condition, and reports whether it became true in time. If not, that is a violation, and the run
// does not go on.
func (r *run) within(atMost time.Duration, what string, condition func() bool) bool {
	r.t.Helper()
	for end := time.Now().Add(atMost); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if condition() {
			return true
		}
	}
	r.violate("not so after %s: %s", atMost, what)
	return false
}

// between draws a duration.
func (r *run) between(least, most time.Duration) time.Duration {
	return least + time.Duration(r.rng.Int64N(int64(most-least)+1))
}

// sleep is the duration of a fault, or of the load before it.
func (r *run) sleep(least, most time.Duration) { time.Sleep(r.between(least, most)) }

// scored returns the number of scores, or -1 if Postgres does not answer.
func (r *run) scored() int {
	rows, err := r.query("SELECT count(*)::text FROM decuwatch.scores")
	if err != nil || len(rows) != 1 {
		return -1
	}
	n := -1
	_, _ = fmt.Sscan(rows[0], &n) // a number, by its query
	return n
}

// working waits until there are n more scores than now.
func (r *run) working(n int) bool {
	r.t.Helper()
	before := r.scored()
	return r.within(deadline, fmt.Sprintf("%d more events are scored", n), func() bool { return r.scored() >= before+n })
}

// query returns the first column of a result.
func (r *run) query(sql string) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	rows, err := r.pool.Query(ctx, sql)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// load publishes in the background until the returned function is called. It is at most about a hundred events ahead of
// the verdicts.
func (r *run) load() (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if done := r.scored(); done >= 0 && r.producer.count()-done < 100 {
				r.producer.publish(8)
			}
		}
	}()
	stop = sync.OnceFunc(func() { close(end); <-ended })
	r.t.Cleanup(stop)
	return stop
}

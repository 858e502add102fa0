package consumers

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/decuwatch/decuwatch/schema"
)

// TestSimulation runs workers against a stream and a database in memory, in virtual time. A seed draws faults: lost
// deliveries, acknowledgements and answers, outages, locks, handlers that fail, hang and panic, workers that are
// stopped or killed. DECUWATCH_SIM_SEEDS=10000 runs more seeds; DECUWATCH_SIM_SEED=17 runs one again. The seed decides
// what a fault hits; it does not decide the order of goroutines.
func TestSimulation(t *testing.T) {
	first, n := uint64(1), uint64(100)
	for name, v := range map[string]*uint64{"DECUWATCH_SIM_SEED": &first, "DECUWATCH_SIM_SEEDS": &n} {
		text, set := os.LookupEnv(name)
		if !set {
			continue
		}
		var err error
		if *v, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if name == "DECUWATCH_SIM_SEED" && os.Getenv("DECUWATCH_SIM_SEEDS") == "" {
			n = 1
		}
	}
	for seed := first; seed < first+n; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { simulate(t, seed) })
		})
	}
}

const (
	simEvents = 60
	simFaults = 2 * time.Minute  // how long there are faults
	simDrain  = 20 * time.Minute // how long everything may take to drain after
	simOutage = 7 * time.Second  // how long an outage lasts
)

// world is a stream, a database, and the faults of a seed.
type world struct {
	t    *testing.T
	seed uint64
	cfg  Config
	born time.Time

	mu       sync.Mutex
	messages []*simMessage
	changed  chan struct{} // closed and replaced when a message becomes available
	tries    map[uint64]schema.Tries
}

// simMessage is one message of the stream and its verdict.
type simMessage struct {
	*world
	sequence  uint64
	plan      plan
	stored    Stored
	delivered int
	due       time.Time // of the next delivery
	settled   string    // the word that the server took: ack or term
	verdict   string    // that is committed
	handled   int       // attempts that a handler began
	failed    int       // of them, those that failed
}

// plan is how the handler treats an event.
type plan string

const (
	planGood      plan = "good"
	planFlaky     plan = "flaky"     // fails once or twice, then is good
	planFailing   plan = "failing"   // always fails
	planPanics    plan = "panics"    // likewise
	planPermanent plan = "permanent" // a dead letter at once
	planInvalid   plan = "invalid"   // cannot be decoded
	planSlow      plan = "slow"      // takes longer than AckWait
	planHangs     plan = "hangs"     // its first attempt does not heed its context
)

// draw returns random numbers for one topic of the simulation. They are the same however goroutines are scheduled.
func (w *world) draw(about ...any) *rand.Rand {
	h := fnv.New64a()
	_, _ = fmt.Fprint(h, about...) // a hash takes everything
	return rand.New(rand.NewPCG(w.seed, h.Sum64()))
}

// faulty draws a fault with the given chance. After a while there are no more faults.
func (w *world) faulty(percent int, about ...any) bool {
	return time.Since(w.born) < simFaults && w.draw(about...).IntN(100) < percent
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, seed: seed, born: time.Now(), changed: make(chan struct{}), tries: map[uint64]schema.Tries{}}
	r := w.draw("config")
	w.cfg = Config{
		Models: []string{"m"}, AckWait: 5 * time.Second, HandleTimeout: 10 * time.Second, DrainTimeout: 5 * time.Second,
		MaxDeliver: 3 + r.IntN(3), MaxInFlight: 1 + r.IntN(30), MaxRows: 1 + r.IntN(100), PullExpiry: 2 * time.Second,
		RetryMaxDelay: 8 * time.Second,
		Logger:        slog.New(slog.DiscardHandler), Tries: w,
	}.withDefaults()
	plans := []plan{
		planGood, planGood, planGood, planGood, planFlaky, planFailing, planPanics, planPermanent, planInvalid, planSlow,
		planHangs,
	}
	for i := range uint64(simEvents) {
		m := &simMessage{world: w, sequence: i + 1, plan: plans[r.IntN(len(plans))]}
		m.due = w.born.Add(time.Duration(r.Int64N(int64(simFaults))))
		if r.IntN(2) == 0 {
			m.due = w.born // a backlog
		}
		header, payload, err := schema.Encode(schema.Event{
			Source: "//sim", ID: strconv.FormatUint(m.sequence, 10), Time: m.due,
			Data: schema.Generation{Model: "m", Class: schema.ClassIndex(1), Seed: m.sequence},
		})
		if err != nil {
			t.Fatal(err)
		}
		if m.plan == planInvalid {
			payload = payload[1:]
		}
		m.stored = Stored{Sequence: m.sequence, Time: m.due, Header: header, Payload: payload}
		m.stored.Subject = schema.SubjectGeneration("m")
		w.messages = append(w.messages, m)
	}
	return w
}

// outage returns why the database refuses a write at this moment: it is away, or locked. While it is locked, health
// checks succeed.
func (w *world) outage() (away, locked bool) {
	window := int(time.Since(w.born) / simOutage)
	switch draw := w.draw("outage", window).IntN(100); {
	case time.Since(w.born) >= simFaults:
		return false, false
	case draw < 15:
		return true, true
	case draw < 30:
		return false, true
	}
	return false, false
}

// simWorker is one process.
type simWorker struct {
	*world
	name   string
	cancel context.CancelFunc
	ended  chan struct{}

	handling map[simKey]time.Time // since when

	life     sync.Mutex
	gone     bool // killed
	broken   bool // its device fails from some moment on
	stopping bool
}

// simKey is one delivery.
type simKey struct {
	sequence uint64
	delivery int
}

// alive reports whether the worker still has an effect on anything. A killed one has none.
func (s *simWorker) alive() bool {
	s.life.Lock()
	defer s.life.Unlock()
	return !s.gone
}

// start runs a worker as Runner.Run does.
func (w *world) start(name string) *simWorker {
	ctx, cancel := context.WithCancel(context.Background())
	s := &simWorker{world: w, name: name, cancel: cancel, ended: make(chan struct{}), handling: map[simKey]time.Time{}}
	cfg := w.cfg
	cfg.Tries, cfg.Healthy = simTries{s}, s.healthy
	work, abandon := context.WithCancelCause(context.Background())
	context.AfterFunc(ctx, func() {
		t := time.AfterFunc(cfg.DrainTimeout, func() { abandon(errDrained) })
		context.AfterFunc(work, func() { t.Stop() })
	})
	r := &Runner{conn: s, cfg: cfg, handler: s, log: cfg.Logger, rows: semaphore.NewWeighted(int64(cfg.MaxRows))}
	r.stop, r.gate = ctx, newGate(work, r.healthy, cfg.Logger, cfg.Metrics)
	l := r.model("m")
	l.open = func(context.Context) (source, error) {
		if w.faulty(10, name, "open", time.Since(w.born)) {
			return nil, errors.New("no responders")
		}
		return s, nil
	}
	var group errgroup.Group
	group.Go(func() error { return r.consume(ctx, work, l) })
	go func() {
		defer close(s.ended)
		if err := group.Wait(); err != nil {
			w.t.Errorf("%s: %v", name, err)
		}
		abandon(nil)
		r.overruns.Wait()
		r.gate.stop()
	}()
	return s
}

// healthy is the worker's health check.
func (s *simWorker) healthy(context.Context) error {
	if away, _ := s.outage(); away {
		return errors.New("connection refused")
	}
	if s.deviceBroken() {
		return errors.New("the device is broken")
	}
	return nil
}

func (s *simWorker) deviceBroken() bool {
	s.life.Lock()
	defer s.life.Unlock()
	return s.broken
}

// kill ends the worker as SIGKILL does: nothing that it does afterwards has an effect. Its goroutines end later.
func (s *simWorker) kill() {
	s.life.Lock()
	s.gone = true
	s.life.Unlock()
	s.stop()
}

// stop stops the worker, as SIGTERM does.
func (s *simWorker) stop() {
	s.life.Lock()
	s.stopping = true
	s.life.Unlock()
	s.cancel()
}

func (s *simWorker) IsClosed() bool { return false }

func (s *simWorker) IsConnected() bool {
	return !s.faulty(5, s.name, "connected", int(time.Since(s.born)/time.Second))
}

// pull delivers messages that are due, as the server does.
func (s *simWorker) pull(ctx context.Context, n int, take func(*message)) error {
	expiry := time.NewTimer(s.cfg.PullExpiry)
	defer expiry.Stop()
	for {
		var deliveries []*simDelivery
		s.mu.Lock()
		changed := s.changed
		next := time.Hour
		for _, m := range s.messages {
			if n == 0 || m.settled != "" {
				continue
			}
			if wait := time.Until(m.due); wait > 0 {
				next = min(next, wait)
				continue
			}
			m.delivered++
			m.due = time.Now().Add(s.cfg.AckWait)
			n--
			deliveries = append(deliveries, &simDelivery{simMessage: m, worker: s, delivery: m.delivered})
		}
		s.mu.Unlock()
		for _, d := range deliveries {
			if s.alive() && !s.faulty(5, "lost", d.sequence, d.delivery) {
				take(&message{Stored: d.stored, acknowledger: d, stream: "GENERATION", delivered: d.delivery})
			}
		}
		if n == 0 {
			return nil
		}
		if s.faulty(3, s.name, "pull", time.Since(s.born)) {
			return errors.New("the connection was lost")
		}
		select {
		case <-changed:
		case <-time.After(next):
		case <-expiry.C:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// simDelivery is one delivery of a message to one worker.
type simDelivery struct {
	*simMessage
	worker   *simWorker
	delivery int
	over     bool // the worker has said its last word
}

// hear delivers an acknowledgement to the server, unless it is lost. For an older delivery, only an ack has an effect,
// as on the real server.
func (d *simDelivery) hear(word string, effect func()) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.worker.alive() || d.faulty(8, word, d.sequence, d.delivery, "up", time.Since(d.born)) {
		return false
	}
	if d.settled == "" {
		effect()
		close(d.changed)
		d.changed = make(chan struct{})
	}
	return true
}

func (d *simDelivery) progress() error {
	if d.over {
		d.t.Errorf("message %d: a heartbeat after the last word", d.sequence)
	}
	d.mu.Lock()
	since, handled := d.worker.handling[simKey{d.sequence, d.delivery}]
	d.mu.Unlock()
	if busy := time.Since(since); handled && busy > d.cfg.HandleTimeout+d.cfg.AckWait {
		d.t.Errorf("message %d (%s): a heartbeat after its handler has been busy for %s", d.sequence, d.plan, busy)
	}
	d.hear("progress", func() {
		if d.delivery == d.delivered {
			d.due = time.Now().Add(d.cfg.AckWait)
		}
	})
	return nil
}

func (d *simDelivery) settle(word string) error {
	d.over = true
	if d.verdict == "" {
		d.t.Errorf("message %d (%s): %s without a verdict", d.sequence, d.plan, word)
	}
	d.settled = word
	return nil
}

func (d *simDelivery) doubleAck(ctx context.Context) error {
	heard := d.hear("ack", func() { _ = d.settle("ack") })
	if !heard || d.faulty(8, "ack answer", d.sequence, d.delivery, time.Since(d.born)) {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (d *simDelivery) nak(delay time.Duration) error {
	d.over = true
	d.worker.life.Lock()
	stopping := d.worker.stopping
	d.worker.life.Unlock()
	if delay > d.cfg.RetryMaxDelay || delay < d.cfg.RetryDelay && !stopping {
		d.t.Errorf("message %d (%s): to be delivered again after %s", d.sequence, d.plan, delay)
	}
	d.hear("nak", func() {
		if d.delivery == d.delivered {
			d.due = time.Now().Add(delay)
		}
	})
	return nil
}

func (d *simDelivery) term(reason string) error {
	d.hear("term", func() { _ = d.settle("term") })
	if !strings.HasPrefix(reason, deadLetterPrefix) {
		d.t.Errorf("message %d is terminated because %q", d.sequence, reason)
	}
	return nil
}

// Plan returns the event's cost, and score.
func (s *simWorker) Plan(
	_ context.Context, ev schema.Event, _ schema.Delivery,
) (int, func(context.Context, schema.Delivery) error, error) {
	return 1 + int(ev.Data.Seed%7), s.score, nil
}

// score scores an event as the monitor does: look up, compute, commit.
func (s *simWorker) score(ctx context.Context, d schema.Delivery) error {
	m := s.messages[d.Sequence-1]
	if known, err := s.known(m); known || err != nil {
		return err
	}
	s.mu.Lock()
	m.handled++
	attempt := m.handled
	key := simKey{m.sequence, d.Delivered}
	s.handling[key] = time.Now()
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.handling, key)
		s.mu.Unlock()
	}()
	took := time.Duration(s.draw("took", m.sequence, attempt).Int64N(int64(3 * time.Second)))
	switch m.plan {
	case planSlow:
		took = s.cfg.AckWait + took
	case planHangs:
		if attempt == 1 {
			time.Sleep(3 * s.cfg.HandleTimeout) // whatever the context says
			took = 0
		}
	}
	select {
	case <-time.After(took):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	s.mu.Lock()
	fails := m.plan == planFailing || m.plan == planPanics || m.plan == planFlaky && m.failed < 1+int(m.sequence%2)
	if fails && s.alive() && !s.deviceBroken() {
		m.failed++
	}
	s.mu.Unlock()
	switch {
	case s.deviceBroken():
		return errors.New("the device is broken")
	case fails && m.plan == planPanics:
		panic("simulated")
	case fails:
		return errors.New("the device failed")
	case m.plan == planPermanent:
		return permanent{errors.New("unknown class"), schema.KindUnknownClass}
	}
	return s.commit(m, "score", attempt)
}

// known looks a verdict up.
func (s *simWorker) known(m *simMessage) (bool, error) {
	if away, _ := s.outage(); away {
		return false, Unavailable(errors.New("connection refused"))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return m.verdict != "", nil
}

// commit writes a verdict, unless there is one. Its answer may be lost.
func (s *simWorker) commit(m *simMessage, verdict string, attempt int) error {
	if _, locked := s.outage(); locked {
		return Unavailable(errors.New("lock timeout"))
	}
	if !s.alive() || s.faulty(5, "commit", m.sequence, attempt, verdict) {
		return Unavailable(errors.New("the connection was lost before the commit"))
	}
	s.mu.Lock()
	if m.verdict == "" {
		m.verdict = verdict
	}
	s.mu.Unlock()
	if s.faulty(5, "committed", m.sequence, attempt, verdict) {
		return Unavailable(errors.New("the answer to the commit was lost"))
	}
	return nil
}

// DeadLetter commits a dead letter.
func (s *simWorker) DeadLetter(_ context.Context, v schema.Verdict) error {
	attempt := int(time.Since(s.born) / time.Millisecond)
	return s.commit(s.messages[v.Delivery.Sequence-1], "dead letter "+string(v.DeadLetter.Kind), attempt)
}

// simTries counts one worker's attempts in the database.
type simTries struct{ *simWorker }

func (s simTries) Try(_ context.Context, d schema.Delivery, add schema.Tries) (schema.Tries, error) {
	if _, locked := s.outage(); locked || !s.alive() {
		return schema.Tries{}, Unavailable(errors.New("lock timeout"))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.tries[d.Sequence]
	sum.Failed, sum.HandedBack = max(0, sum.Failed+add.Failed), max(0, sum.HandedBack+add.HandedBack)
	sum.Watched, sum.Alone = max(0, sum.Watched+add.Watched), max(0, sum.Alone+add.Alone)
	s.tries[d.Sequence] = sum
	return sum, nil
}

// Try lets the world be the Tries of a configuration.
func (w *world) Try(context.Context, schema.Delivery, schema.Tries) (schema.Tries, error) {
	return schema.Tries{}, errors.New("of no worker")
}

func simulate(t *testing.T, seed uint64) {
	time.Sleep(30 * 365 * 24 * time.Hour) // the virtual clock begins in a year that events refuse
	w := newWorld(t, seed)
	workers := []*simWorker{w.start("a"), w.start("b")}
	all := workers
	// Workers are stopped and killed, and others take their place.
	for i := 0; time.Since(w.born) < simFaults-time.Minute; i++ {
		r := w.draw("restart", i)
		time.Sleep(time.Duration(r.Int64N(int64(20 * time.Second))))
		n := r.IntN(len(workers))
		if r.IntN(3) == 0 {
			workers[n].kill()
		} else {
			workers[n].stop()
			if r.IntN(2) == 0 {
				<-workers[n].ended
			}
		}
		workers[n] = w.start(fmt.Sprintf("worker %d", i))
		all = append(all, workers[n])
	}
	if w.draw("broken").IntN(3) == 0 { // for good: the other worker must get all the work done
		workers[0].life.Lock()
		workers[0].broken = true
		workers[0].life.Unlock()
	}
	drained := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, m := range w.messages {
			if m.settled == "" {
				return false
			}
		}
		return true
	}
	for end := time.Now().Add(simDrain); !drained() && time.Now().Before(end); {
		time.Sleep(time.Second)
	}
	for _, s := range all {
		s.stop()
		<-s.ended
	}
	for _, m := range w.messages {
		want := "score"
		switch m.plan {
		case planFailing, planPanics:
			want = "dead letter failed"
		case planPermanent:
			want = "dead letter unknown_class"
		case planInvalid:
			want = "dead letter invalid"
		}
		// This many workers were killed while they handled it alone.
		if w.tries[m.sequence].Alone >= endsAlone && m.verdict != want {
			want = "dead letter given_up"
		}
		// Failures during an outage, or in a worker that ends, do not count.
		if most := w.cfg.MaxDeliver + len(all) + 2*int(simFaults/simOutage); m.failed > most {
			t.Errorf("message %d (%s) failed %d times, at most %d are allowed", m.sequence, m.plan, m.failed, most)
		}
		if m.verdict != want || m.settled == "" {
			t.Errorf("message %d (%s): verdict %q and word %q after %d deliveries, %d attempts, %d failures (%+v), want %q",
				m.sequence, m.plan, m.verdict, m.settled, m.delivered, m.handled, m.failed, w.tries[m.sequence], want)
		}
	}
}

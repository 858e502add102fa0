package faults

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/schema"
)

// settle waits until the backlog has drained by itself. Then it compares the producer's log with Postgres and the
// stream of alerts, and checks that reconcile finds the same.
func (r *run) settle() {
	r.t.Helper()
	r.settleWithin(deadline)
}

func (r *run) settleWithin(atMost time.Duration) {
	r.t.Helper()
	if !r.drained(atMost) {
		return // all further checks would fail, too
	}
	r.exactlyOne()
	r.watch.stop()
	clean := len(r.violations) == 0
	if code, said := r.reconcile(); clean && code != 0 {
		r.violate("the producer's log agrees, and reconcile has exit code %d: %s", code, said)
	}
}

// drained waits until everything that the log asks for is there, the consumer has no waiting events, and every alert
// was sent.
func (r *run) drained(atMost time.Duration) bool {
	r.t.Helper()
	var missing []string
	var err error
	for end := time.Now().Add(atMost); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		var found *found
		if found, err = r.look(); err != nil {
			continue
		}
		if missing = r.missing(found); len(missing) > 0 {
			continue
		}
		var waiting string
		if waiting, err = r.waiting(); err != nil {
			continue
		}
		if waiting == "" {
			r.drain = time.Since(r.mended)
			return true
		}
		missing = []string{waiting}
	}
	if err != nil {
		r.violate("after %s the servers do not answer: %v", atMost, err)
	}
	for _, m := range missing {
		r.violate("after %s: %s", atMost, m)
	}
	return false
}

// found is the content of Postgres and of the stream of alerts.
type found struct {
	verdicts    map[string][]string // outcomes of an event, by its id
	deadLetters map[uint64][]string // kinds and fields of dead letters, by sequence
	scored      map[string]string   // digest of the ensemble, by the event's id
	alerts      map[string]bool     // alerts of Postgres by id; true if it is about one score
	published   map[string]int      // copies in the stream, by id
}

func (r *run) look() (*found, error) {
	f := &found{
		verdicts: map[string][]string{}, deadLetters: map[uint64][]string{}, scored: map[string]string{},
		alerts: map[string]bool{},
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	// A dead letter that does not settle an event's identity belongs to the message, not to the event.
	rows, err := r.pool.Query(ctx, `
		SELECT 'v', event_id, 'score', ensemble_digest FROM decuwatch.scores
		UNION ALL SELECT 'v', event_id, 'skip', reason FROM decuwatch.skips
		UNION ALL SELECT 'v', event_id, 'dead_letter', kind FROM decuwatch.dead_letters
			WHERE event_id IS NOT NULL AND kind NOT IN ('invalid', 'duplicate_id')
		UNION ALL SELECT 'l', sequence::text, kind, field FROM decuwatch.dead_letters
		UNION ALL SELECT 'a', id, kind, '' FROM decuwatch.alerts WHERE delivery = 'owed'`)
	if err != nil {
		return nil, err
	}
	for rows.Next() {
		var of, key, what, detail string
		if err := rows.Scan(&of, &key, &what, &detail); err != nil {
			return nil, err
		}
		switch of {
		case "v":
			f.verdicts[key] = append(f.verdicts[key], what)
			if what == "score" {
				f.scored[key] = detail
			}
		case "l":
			var sequence uint64
			if _, err := fmt.Sscan(key, &sequence); err != nil {
				return nil, err
			}
			f.deadLetters[sequence] = append(f.deadLetters[sequence], what+" "+detail)
		case "a":
			f.alerts[key] = what == "score"
		}
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	f.published, err = r.publishedAlerts(ctx)
	return f, err
}

// publishedAlerts returns how often each alert is in the stream.
func (r *run) publishedAlerts(ctx context.Context) (map[string]int, error) {
	found := map[string]int{}
	stream, err := r.js.Stream(ctx, alertStream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return found, nil // it is created with the first alert
	}
	if err != nil {
		return nil, err
	}
	state := stream.CachedInfo().State
	for sequence := state.FirstSeq; state.Msgs > 0 && sequence <= state.LastSeq; sequence++ {
		stored, err := consumers.ReadStored(ctx, r.js, alertStream, sequence)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue // deleted by the run itself
		}
		if err != nil {
			return nil, err
		}
		a, err := schema.DecodeAlert(stored.Payload)
		if err != nil {
			return nil, err
		}
		if ids := stored.Header[schema.HeaderMessageID]; len(ids) != 1 || ids[0] != a.ID {
			r.violate("alert %s is published under the message id %q", a.ID, ids)
		}
		found[a.ID]++
	}
	return found, nil
}

// missing returns what the log asks for and is not there.
func (r *run) missing(f *found) []string {
	var list []string
	add := func(format string, args ...any) { list = append(list, fmt.Sprintf(format, args...)) }
	clashes := map[string]int{}
	for _, s := range r.producer.sent() {
		deadLetters := f.deadLetters[s.sequence]
		switch s.kind {
		case good, unknownClass, poison:
			if len(f.verdicts[s.id]) == 0 {
				add("event %s, message %d, has no verdict", s.id, s.sequence)
			}
		case repeat:
		case clash:
			if len(f.verdicts[s.id]) == 0 {
				add("event %s, message %d, has no verdict", s.id, s.sequence)
			}
			clashes[s.id] += len(deadLetters)
		case broken, unknownModel:
			if len(deadLetters) == 0 {
				add("message %d (%s %s) has no dead letter", s.sequence, s.kind, s.field)
			}
		}
	}
	for id, deadLetters := range clashes {
		if deadLetters == 0 {
			add("event %s: two messages share the id, and neither has a dead letter", id)
		}
	}
	for id, digest := range f.scored {
		if alert := alerts.ID(source, id, digest, schema.ClassGap); !f.alerts[alert] {
			add("the score of event %s passed the threshold, and has no alert", id)
		}
	}
	for id := range f.alerts {
		if f.published[id] == 0 {
			add("alert %s is in Postgres, and not in the stream", id)
		}
	}
	return list
}

// waiting describes what still waits at the model's consumer.
func (r *run) waiting() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := r.js.Consumer(ctx, eventStream, consumers.Durable(model))
	if err != nil {
		return "", err
	}
	if info := c.CachedInfo(); info.NumPending > 0 || info.NumAckPending > 0 {
		return fmt.Sprintf("%d messages wait, and %d for their acknowledgement", info.NumPending, info.NumAckPending), nil
	}
	owed, err := r.query("SELECT sink || ' ' || count(*) FROM decuwatch.outbox WHERE delivered_at IS NULL GROUP BY sink")
	if err != nil || len(owed) == 0 {
		return "", err
	}
	return fmt.Sprintf("alerts are owed: %v", owed), nil
}

// lookUntil looks until the servers answer, because a leader may just have changed.
func (r *run) lookUntil() *found {
	r.t.Helper()
	var f *found
	r.eventually("look at what is stored", func(context.Context) (err error) {
		f, err = r.look()
		return err
	})
	return f
}

// exactlyOne compares what is found with the log: each event has one verdict, the right one, and there are no other
// events.
func (r *run) exactlyOne() {
	r.t.Helper()
	f := r.lookUntil()
	want := map[string]string{} // outcome by id
	deadLetters := map[uint64][]string{}
	clashes := map[string]map[uint64]bool{}
	for _, s := range r.producer.sent() {
		switch s.kind {
		case good, clash:
			want[s.id] = "score"
		case unknownClass:
			want[s.id] = "dead_letter"
			deadLetters[s.sequence] = []string{"unknown_class data.class"}
		case broken:
			deadLetters[s.sequence] = []string{"invalid " + s.field}
		case poison:
			want[s.id] = "dead_letter"
			deadLetters[s.sequence] = []string{"given_up "}
		case unknownModel:
			want[s.id] = "dead_letter"
			deadLetters[s.sequence] = []string{"unknown_model data.model"}
		case repeat:
		}
		if s.kind == clash {
			if clashes[s.id] == nil {
				clashes[s.id] = map[uint64]bool{}
			}
			clashes[s.id][s.sequence] = true
		}
	}
	for id, outcome := range want {
		if got := f.verdicts[id]; len(got) != 1 || got[0] != outcome {
			r.violate("event %s has the verdicts %v, must be one: %s", id, got, outcome)
		}
	}
	for id, verdicts := range f.verdicts {
		if want[id] == "" && !r.producer.perhaps(id) {
			r.violate("event %s has the verdicts %v, and was never acknowledged", id, verdicts)
		}
		if len(verdicts) > 1 && want[id] == "" {
			r.violate("event %s, which was not acknowledged, has the verdicts %v", id, verdicts)
		}
	}
	for id, sequences := range clashes {
		n := 0
		for sequence := range sequences {
			for _, l := range f.deadLetters[sequence] {
				n++
				if l != "duplicate_id id" {
					r.violate("message %d of the id %s used twice has the dead letter %s", sequence, id, l)
				}
			}
			delete(f.deadLetters, sequence)
		}
		if n != 1 {
			r.violate("the id %s was used twice, and has %d dead letters, must be 1", id, n)
		}
	}
	for sequence, got := range f.deadLetters {
		if !slices.Equal(got, deadLetters[sequence]) {
			r.violate("message %d has the dead letters %q, want %q", sequence, got, deadLetters[sequence])
		}
	}
	known := map[string]bool{}
	for id, digest := range f.scored {
		known[alerts.ID(source, id, digest, schema.ClassGap)] = true
	}
	for id, ofScore := range f.alerts {
		if ofScore && !known[id] {
			r.violate("alert %s is of no stored score", id)
		}
	}
	for id := range f.published {
		if _, ok := f.alerts[id]; !ok {
			r.violate("alert %s is in the stream, and not in Postgres", id)
		}
	}
	r.alerts = len(f.alerts)
	again, err := r.query("SELECT count(*)::text FROM decuwatch.events WHERE delivered > 1")
	if err != nil {
		r.violate("count redeliveries: %v", err)
		return
	}
	_, _ = fmt.Sscan(again[0], &r.redelivered) // a number, by its query
}

// perhaps reports whether an event was published without an acknowledgement. It may have a verdict or not.
func (p *producer) perhaps(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.maybe[id]
}

// reconcile runs the verb and returns its exit code and the end of its output.
func (r *run) reconcile() (code int, said string) {
	r.t.Helper()
	p := start(r.t, decuwatch, nil, "reconcile", "--nats.url="+r.natsURL, "--postgres.url="+r.postgresURL)
	if code = p.exit(deadline); code == -2 {
		r.violate("reconcile does not end within %s", deadline)
	}
	return code, p.tail(1000)
}

// objects changes data behind decuwatch's back and expects reconcile to notice. It ends a run, because nothing is
// repaired.
func (r *run) objects() {
	r.t.Helper()
	if len(r.violations) > 0 {
		return
	}
	ways := []struct {
		what string
		do   func(ctx context.Context) error
	}{
		{"a verdict was deleted", r.deleteVerdict},
		{"a published alert was deleted", r.deleteAlert},
		{"an alert was forged", r.forgeAlert},
	}
	way := ways[r.rng.IntN(len(ways))]
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := way.do(ctx); err != nil {
		r.t.Fatalf("%s: %v", way.what, err)
	}
	if code, said := r.reconcile(); code != 3 {
		r.violate("%s, and reconcile has exit code %d, must be 3: %s", way.what, code, said)
	}
}

func (r *run) deleteVerdict(ctx context.Context) error {
	var ids []string
	for _, s := range r.producer.sent() {
		if s.kind == good {
			ids = append(ids, s.id)
		}
	}
	id := ids[r.rng.IntN(len(ids))]
	for _, table := range []string{"scores", "events"} {
		if _, err := r.pool.Exec(ctx, "DELETE FROM decuwatch."+table+" WHERE event_id = $1", id); err != nil {
			return err
		}
	}
	return nil
}

// deleteAlert purges the alerts of one class, but not the first in the stream: earlier alerts may have expired.
func (r *run) deleteAlert(ctx context.Context) error {
	stream, err := r.js.Stream(ctx, alertStream)
	if err != nil {
		return err
	}
	first, err := consumers.ReadNext(ctx, r.js, alertStream, 1, ">")
	if err != nil {
		return err
	}
	state := stream.CachedInfo().State
	for sequence := state.LastSeq; sequence > state.FirstSeq; sequence-- {
		last, err := consumers.ReadStored(ctx, r.js, alertStream, sequence)
		if err != nil {
			return err
		}
		if last.Subject != first.Subject {
			return stream.Purge(ctx, jetstream.WithPurgeSubject(last.Subject))
		}
	}
	return errors.New("all alerts are of one class")
}

func (r *run) forgeAlert(ctx context.Context) error {
	stored, err := consumers.ReadNext(ctx, r.js, alertStream, 1, ">")
	if err != nil {
		return err
	}
	a, err := schema.DecodeAlert(stored.Payload)
	if err != nil {
		return err
	}
	a.ID = "0123456789abcdef0123456789abcdef"
	_, payload, err := schema.EncodeAlert(a)
	if err != nil {
		return err
	}
	_, err = r.js.Publish(ctx, schema.AlertSubject(a), payload)
	return err
}

// watcher checks that no verdict changes. It remembers the first state of each verdict that it sees.
type watcher struct {
	r    *run
	quit chan struct{}
	wait sync.WaitGroup
	once sync.Once

	mu   sync.Mutex
	seen map[string]string
}

func (r *run) newWatcher() *watcher {
	w := &watcher{r: r, quit: make(chan struct{}), seen: map[string]string{}}
	w.wait.Go(func() {
		for {
			select {
			case <-w.quit:
				return
			case <-time.After(250 * time.Millisecond):
				w.look()
			}
		}
	})
	r.t.Cleanup(func() { w.end() })
	return w
}

// stop checks once more and ends.
func (w *watcher) stop() {
	w.end()
	w.look()
}

func (w *watcher) end() {
	w.once.Do(func() { close(w.quit) })
	w.wait.Wait()
}

// forget makes the watcher start again, after Postgres was restored from a backup.
func (w *watcher) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.seen)
}

func (w *watcher) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	rows, err := w.r.query(`
		SELECT e.event_id || '=' || e.outcome || ' ' || e.reason || ' ' || e.sequence || ' ' || e.recorded_at || ' ' ||
			coalesce(s.class_gap::text || ' ' || s.seed, '')
		FROM decuwatch.events e LEFT JOIN decuwatch.scores s USING (source, event_id)
		UNION ALL SELECT 'message ' || sequence || '=' || kind || ' ' || field || ' ' || recorded_at
			FROM decuwatch.dead_letters`)
	if err != nil {
		return // Postgres is away, which is the fault
	}
	now := map[string]string{}
	for _, row := range rows {
		key, state, _ := strings.Cut(row, "=")
		now[key] = state
	}
	for key, state := range w.seen {
		if now[key] != state {
			w.r.violate("the verdict on %s changed from %q to %q", key, state, now[key])
		}
	}
	maps.Copy(w.seen, now)
}

package review_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/monitor/canary"
	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Each change, in each state, with what it must not do.
func TestChange(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	history := 0
	for _, c := range []struct {
		name    string
		change  review.Change
		refused string             // "" if it succeeds
		state   schema.ReviewState // after it
		holder  string             // assignee after it
	}{
		{"no name", review.Change{Action: review.Acknowledge}, "name", schema.ReviewOpen, ""},
		{"unprintable name", review.Change{Action: review.Acknowledge, Actor: "a\x1bb"}, "printable", schema.ReviewOpen, ""},
		{"unknown action", review.Change{Action: "delete", Actor: "ada"}, "no action", schema.ReviewOpen, ""},
		{"reopen what is open", review.Change{Action: review.Reopen, Actor: "ada"}, "not resolved", schema.ReviewOpen, ""},
		{"empty comment", review.Change{Action: review.Comment, Actor: "ada", Comment: " \n"}, "empty", schema.ReviewOpen,
			""},
		{"long comment", review.Change{Action: review.Comment, Actor: "ada", Comment: strings.Repeat("x", 4001)},
			"4001 characters", schema.ReviewOpen, ""},
		{"comment", review.Change{Action: review.Comment, Actor: "ada", Comment: strings.Repeat("é", 4000)}, "",
			schema.ReviewOpen, ""},
		{"acknowledge", review.Change{Action: review.Acknowledge, Actor: "ada"}, "", schema.ReviewAcknowledged, "ada"},
		{"acknowledge again", review.Change{Action: review.Acknowledge, Actor: "bob"}, "ada acknowledged it already",
			schema.ReviewAcknowledged, "ada"},
		{"assign", review.Change{Action: review.Assign, Actor: "ada", Assignee: "bob"}, "", schema.ReviewAcknowledged, "bob"},
		{"assign again", review.Change{Action: review.Assign, Actor: "ada", Assignee: "bob"}, "already",
			schema.ReviewAcknowledged, "bob"},
		{"no such verdict", review.Change{Action: review.Resolve, Actor: "bob", Verdict: "maybe"}, "must be one of",
			schema.ReviewAcknowledged, "bob"},
		{"resolve", review.Change{Action: review.Resolve, Actor: "bob", Verdict: schema.VerdictExpected}, "",
			schema.ReviewResolved, "bob"},
		{"resolve again", review.Change{Action: review.Resolve, Actor: "ada", Verdict: schema.VerdictConfirmed},
			"resolved already (expected)", schema.ReviewResolved, "bob"},
		{"acknowledge what is resolved", review.Change{Action: review.Acknowledge, Actor: "ada"}, "resolved already",
			schema.ReviewResolved, "bob"},
		{"reopen", review.Change{Action: review.Reopen, Actor: "ada", Comment: "new images"}, "", schema.ReviewOpen, "bob"},
		{"nobody", review.Change{Action: review.Assign, Actor: "ada"}, "", schema.ReviewOpen, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := c.change.Apply(t.Context(), b.store, id)
			if c.refused == "" {
				history++
				if err != nil {
					t.Fatal(err)
				}
			} else if !errors.Is(err, review.ErrRefused) || !strings.Contains(err.Error(), c.refused) {
				t.Errorf("%v, want a refusal that says %q", err, c.refused)
			}
			stored, err := b.store.ReviewByID(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			if stored.State != c.state || stored.Assignee != c.holder || stored.Version != history+1 ||
				r.Version != stored.Version {
				t.Errorf("%s, %q, version %d (returned %d); want %s, %q, %d", stored.State, stored.Assignee, stored.Version,
					r.Version, c.state, c.holder, history+1)
			}
			entries, err := b.store.ReviewHistory(t.Context(), id)
			if err != nil || len(entries) != history {
				t.Errorf("%d entries in the history, want %d, %v", len(entries), history, err)
			}
		})
	}
	// The verdict and its taking back are owed to the stream, each once; nothing else is, but the alert.
	due, err := b.store.OutboxNext(t.Context(), schema.SinkStream, 10, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, m := range due {
		if m.Subject != "uncertainty.review.tiny" {
			continue
		}
		r, err := schema.DecodeReview(m.Body)
		if err != nil {
			t.Fatal(err)
		}
		told = append(told, fmt.Sprint(r.Version, " ", r.State, " ", r.Verdict, " ", r.Reviewer, " ", r.ReviewID == id))
	}
	if want := "5 resolved expected bob true|6 open  ada true"; strings.Join(told, "|") != want || len(due) != 3 {
		t.Errorf("told %q of %d messages, want %q", strings.Join(told, "|"), len(due), want)
	}
	if _, err := (review.Change{Action: review.Acknowledge, Actor: "ada"}).Apply(t.Context(), b.store,
		"00000000"); !errors.Is(err, postgres.ErrNotFound) {
		t.Errorf("unknown review: %v", err)
	}
	if _, err := (review.Change{Action: review.Acknowledge, Actor: "ada", Version: 1}).Apply(t.Context(), b.store,
		id); !errors.Is(err, review.ErrConflict) {
		t.Errorf("an old version: %v", err)
	}
	if r, err := (review.Change{Action: review.Acknowledge, Actor: "ada"}).Apply(t.Context(), b.store,
		id[:8]); err != nil || r.ID != id {
		t.Errorf("a shortened id: %+v, %v", r, err)
	}
}

// Of many who acknowledge at the same moment, one does; the others are told.
func TestOneOfManyAcknowledges(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			_, err := (review.Change{Action: review.Acknowledge, Actor: fmt.Sprint("reviewer-", i),
				Version: 1}).Apply(t.Context(), b.store, id)
			switch {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, review.ErrConflict) && !errors.Is(err, review.ErrRefused):
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	entries, err := b.store.ReviewHistory(t.Context(), id)
	if err != nil || won.Load() != 1 || len(entries) != 1 {
		t.Errorf("%d acknowledged, %d entries, %v", won.Load(), len(entries), err)
	}
}

// The queue's filters, counts and pages, and what a canary is kept from.
func TestQueue(t *testing.T) {
	b := newBench(t, tiny)
	for i := range 7 {
		b.record(request{class: i % 2, seed: uint64(i), alert: []schema.Severity{schema.SeverityWarn,
			schema.SeverityCritical}[i%2]})
	}
	_, sample := b.record(request{class: 0, seed: 9, sampled: true})
	if err := b.store.AddCanary(t.Context(), postgres.Canary{Source: canary.Source,
		EventID: fmt.Sprintf("event-%d", b.n+1), Model: "tiny", DueAt: time.Now(), PublishedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	_, id := b.record(request{class: 0, seed: 10, alert: schema.SeverityWarn, source: canary.Source,
		labels: map[string]string{schema.LabelCanary: "true"}})
	if _, err := b.store.ReviewByID(t.Context(), id); !errors.Is(err, postgres.ErrNotFound) {
		t.Errorf("a canary is in review: %v", err)
	}
	if stats, err := b.store.EvidenceStats(t.Context()); err != nil || stats.Pending != 8 {
		t.Errorf("evidence is owed to %d, want 8, %v", stats.Pending, err)
	}
	one := 1
	for _, c := range []struct {
		name   string
		filter postgres.ReviewFilter
		want   int
	}{
		{"all", postgres.ReviewFilter{}, 8},
		{"class", postgres.ReviewFilter{Class: &one}, 3},
		{"severity", postgres.ReviewFilter{Severity: schema.SeverityWarn}, 4},
		{"model", postgres.ReviewFilter{Model: "another"}, 0},
		{"state", postgres.ReviewFilter{States: []schema.ReviewState{schema.ReviewResolved}}, 0},
		{"assignee", postgres.ReviewFilter{Assignee: "ada"}, 0},
	} {
		found, err := b.store.Reviews(t.Context(), c.filter)
		if err != nil || len(found) != c.want {
			t.Errorf("%s: %d, want %d, %v", c.name, len(found), c.want, err)
		}
		counts, err := b.store.ReviewCounts(t.Context(), c.filter)
		if total := counts[schema.ReviewOpen]; err != nil || c.name != "state" && total != c.want {
			t.Errorf("%s: counts %v, want %d, %v", c.name, counts, c.want, err)
		}
	}
	seen := map[string]bool{}
	f := postgres.ReviewFilter{Limit: 3}
	for {
		page, err := b.store.Reviews(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range page {
			if seen[r.ID] {
				t.Errorf("%s is on two pages", r.ID)
			}
			seen[r.ID] = true
		}
		if len(page) < 3 {
			break
		}
		f.After = &page[2].Place
	}
	if len(seen) != 8 || !seen[sample] {
		t.Errorf("the pages hold %d reviews, want 8", len(seen))
	}
	of := schema.Series{Model: "tiny", EnsembleDigest: b.engine.Ensemble().Digest,
		Settings: b.engine.Profile().Settings()}
	values, err := b.store.ScoreValues(t.Context(), of, schema.ClassGap, nil, time.Now().Add(-time.Hour), 100)
	if err != nil || len(values) != 8 {
		t.Errorf("the distribution holds %d values, want 8 without the canary's, %v", len(values), err)
	}
}

// The whole of review works with the rights of the monitor's own role, and with no others.
func TestWriterMayReview(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	conn, err := pgx.Connect(t.Context(), b.url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for _, sql := range []string{`DROP ROLE IF EXISTS review_writer`,
		`CREATE ROLE review_writer LOGIN PASSWORD 'secret' IN ROLE decuwatch_writer`} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	store, err := postgres.Open(t.Context(), postgres.Config{URL: pgtest.As(t, b.url, "review_writer", "secret")})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	worker, err := review.NewWorker(store, []review.Gatherer{b.engine}, review.WorkerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	stop := running(t, worker.Run)
	until(t, "the evidence is there", func() bool { return b.evidence(id) == postgres.EvidenceDone })
	stop()
	if _, err := (review.Change{Action: review.Resolve, Actor: "ada",
		Verdict: schema.VerdictConfirmed}).Apply(t.Context(), store, id); err != nil {
		t.Error(err)
	}
	if _, err := review.LoadStats(t.Context(), store, "", nil, time.Now().Add(-time.Hour), time.Now()); err != nil {
		t.Error(err)
	}
	publish := func(context.Context, schema.Event) error { return nil }
	watchdog, err := canary.New(store, publish, []*ensemble.Manifest{&b.engine.Ensemble().Manifest},
		canary.Config{Deadline: time.Microsecond})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watchdog.Send(t.Context(), "tiny"); err != nil {
		t.Error(err)
	}
	if closed, err := watchdog.Decide(t.Context()); err != nil || len(closed) != 1 {
		t.Errorf("%+v, %v", closed, err)
	}
	site := servePage(t, store, review.PageConfig{})
	for _, path := range []string{"/", "/review/" + id, "/review/" + id + "/evidence/map", "/stats"} {
		if status, _, text := ask(t, "GET", site.URL+path, nil, nil); status != 200 {
			t.Errorf("%s: %d %s", path, status, text)
		}
	}
}

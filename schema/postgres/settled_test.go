package postgres_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

func letter(sequence uint64, message, subject string, kind schema.DeadLetterKind, ev *schema.Event) schema.Verdict {
	return schema.Verdict{Delivery: delivery(sequence, message), DeadLetter: &schema.DeadLetter{
		Event: ev, Subject: subject, Kind: kind, Field: "data.model", Reason: "is wrong", Payload: []byte(message),
	}}
}

// A dead letter of a message on one subject settles that message, and no event of another subject. An invalid event can
// be sent again, corrected.
func TestDeadLettersClaimOnlyTheirOwn(t *testing.T) {
	for _, c := range []struct {
		name, subject string
		kind          schema.DeadLetterKind
	}{
		{"another subject", "generation.requested.other", "invalid"},
		{"another subject, given up", "generation.requested.other", "given_up"},
		{"another subject, unknown model", "generation.requested.other", "unknown_model"},
		{"a deeper subject", "generation.requested.fashion-mnist.deeper", "failed"},
		{"invalid on its own subject", "generation.requested.fashion-mnist", "invalid"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, conn := open(t, postgres.Config{})
			ev := event("one")
			if r := mustRecord(t, s, letter(1, "wrong", c.subject, c.kind, &ev)); !r.First {
				t.Fatalf("dead letter: %+v", r)
			}
			// The server's advisory about the same message has another kind, and changes nothing.
			if r := mustRecord(t, s, letter(1, "wrong", c.subject, "given_up", &ev)); r.First || r.Reason != string(c.kind) {
				if r.First {
					t.Errorf("the message has a second verdict: %+v", r)
				}
			}
			if known, err := s.Known(testContext(t), ev.Identity(), delivery(1, "wrong")); !known || err != nil {
				t.Errorf("the message itself: known %t, %v", known, err)
			}
			// The same bytes on the right subject, and a corrected event.
			for _, message := range []string{"wrong", "right"} {
				if known, err := s.Known(testContext(t), ev.Identity(), delivery(2, message)); known || err != nil {
					t.Errorf("%s on its own subject: known %t, %v", message, known, err)
				}
			}
			if r := mustRecord(t, s, scoreVerdict(2, "one")); !r.First || r.Outcome != schema.OutcomeScore {
				t.Errorf("the event on its own subject: %+v", r)
			}
			if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.dead_letters WHERE source = $1 AND event_id = $2`,
				ev.Source, ev.ID); n != 1 {
				t.Errorf("the producer finds %d dead letters", n)
			}
		})
	}
}

// A dead letter without an event names its producer as far as the message tells.
func TestDeadLetterNamesItsProducer(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	v := letter(1, "one", "generation.requested.fashion-mnist", "invalid", nil)
	v.DeadLetter.Source = "//studio/render"
	mustRecord(t, s, v)
	v = letter(2, "two", "generation.requested.fashion-mnist", "invalid", nil)
	v.DeadLetter.Source, v.DeadLetter.EventID = "//studio/render", "e-2"
	mustRecord(t, s, v)
	mustRecord(t, s, letter(3, "three", "generation.requested.fashion-mnist", "invalid", nil))
	n := count(t, conn, `SELECT count(*) FROM decuwatch_views.dead_letters WHERE source = '//studio/render'
		AND model = 'fashion-mnist'`)
	if n != 2 {
		t.Errorf("the producer finds %d dead letters, want 2", n)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.events`); n != 0 {
		t.Errorf("%d identities are claimed by messages that could not be decoded", n)
	}
}

// Every settled message has a row by its sequence, also one that repeats an event, whether the repeat was recognized
// before the work or after.
func TestSettledSequences(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	mustRecord(t, s, scoreVerdict(3, "one"))
	if r := mustRecord(t, s, scoreVerdict(5, "one")); r.First {
		t.Fatalf("a repeat: %+v", r)
	}
	ev := event("one")
	for range 2 {
		if known, err := s.Known(testContext(t), ev.Identity(), delivery(6, "one")); !known || err != nil {
			t.Fatalf("a repeat: known %t, %v", known, err)
		}
	}
	if known, err := s.Known(testContext(t), event("two").Identity(), delivery(7, "two")); known || err != nil {
		t.Errorf("a new event: known %t, %v", known, err)
	}
	var invalid *schema.Invalid
	if _, err := s.Known(testContext(t), ev.Identity(), delivery(8, "another")); !errors.As(err, &invalid) ||
		invalid.Field != "id" {
		t.Errorf("another event's identifier: %v", err)
	}
	if _, err := s.Record(testContext(t), schema.Verdict{Delivery: delivery(8, "another"),
		Score: score("one", 0.3, 0.1)}); !errors.As(err, &invalid) {
		t.Errorf("another event's identifier: %v", err)
	}
	mustRecord(t, s, letter(9, "junk", "generation.requested.fashion-mnist", "invalid", nil))
	settled, err := s.Settled(testContext(t), "GENERATION", 1, 100)
	var sequences []uint64
	for _, m := range settled {
		sequences = append(sequences, m.Sequence)
	}
	if err != nil || !slices.Equal(sequences, []uint64{3, 5, 6, 9}) {
		t.Errorf("settled are %v, %v; want 3, 5, 6, 9", sequences, err)
	}
	verdicts, err := s.VerdictsBySequence(testContext(t), "GENERATION", 1, 100)
	var outcomes []schema.Outcome
	for _, v := range verdicts {
		outcomes = append(outcomes, v.Outcome)
	}
	if want := []schema.Outcome{"score", "repeat", "repeat", "dead_letter"}; err != nil || !slices.Equal(outcomes, want) {
		t.Errorf("outcomes are %v, %v; want %v", outcomes, err, want)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.scores`); n != 1 {
		t.Errorf("%d scores, want 1", n)
	}
}

// A message that has a verdict gets no second one, however it is read later.
func TestOneVerdictAMessage(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	mustRecord(t, s, scoreVerdict(1, "one"))
	// Read again by stricter rules, it cannot be decoded.
	r := mustRecord(t, s, letter(1, "one", "generation.requested.fashion-mnist", "invalid", nil))
	if r.First || r.Outcome != schema.OutcomeScore {
		t.Errorf("a second verdict: %+v", r)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.dead_letters`); n != 0 {
		t.Errorf("%d dead letters beside the score", n)
	}
}

func TestTries(t *testing.T) {
	s, _ := open(t, postgres.Config{})
	d := delivery(1, "one")
	for _, c := range []struct{ add, want schema.Tries }{
		{schema.Tries{}, schema.Tries{}},
		{schema.Tries{Failed: 1}, schema.Tries{Failed: 1}},
		{schema.Tries{Failed: 1, Alone: 1}, schema.Tries{Failed: 2, Alone: 1}},
		{schema.Tries{Alone: -1, HandedBack: 1}, schema.Tries{Failed: 2, HandedBack: 1}},
		{schema.Tries{Alone: -1, Watched: 2}, schema.Tries{Failed: 2, HandedBack: 1, Watched: 2}},
		{schema.Tries{}, schema.Tries{Failed: 2, HandedBack: 1, Watched: 2}},
	} {
		if got, err := s.Try(testContext(t), d, c.add); err != nil || got != c.want {
			t.Errorf("after %+v: %+v, %v; want %+v", c.add, got, err, c.want)
		}
	}
	if got, err := s.Try(testContext(t), delivery(1, "another stream's"), schema.Tries{}); err != nil ||
		got != (schema.Tries{}) {
		t.Errorf("another message of that sequence: %+v, %v", got, err)
	}
}

// of returns the verdict on an event of another model that has the same source and id.
func of(model string, v schema.Verdict) schema.Verdict {
	v.Delivery.Digest = digestOf(model + v.Score.Event.ID)
	v.Score.Event.Data.Model = model
	v.Score.Receipt.EnsembleDigest = digestOf(model)
	return v
}

// Events of two models that share source and id each get a verdict of their own.
func TestModelsDoNotShareIdentities(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ours, theirs := scoreVerdict(1, "one"), of("other", scoreVerdict(2, "one"))
	ours.Sampled, theirs.Sampled = true, true
	for _, v := range []schema.Verdict{ours, theirs} {
		ev := v.Score.Event
		if known, err := s.Known(testContext(t), ev.Identity(), v.Delivery); known || err != nil {
			t.Errorf("%s before its verdict: known %t, %v", ev.Data.Model, known, err)
		}
		if r := mustRecord(t, s, v); !r.First {
			t.Errorf("%s: %+v", ev.Data.Model, r)
		}
		if r := mustRecord(t, s, v); r.First {
			t.Errorf("%s: a second verdict", ev.Data.Model)
		}
		r, found, err := s.Lookup(testContext(t), ev.Identity(), v.Delivery.Digest)
		if err != nil || !found || r.Score == nil || r.Score.Event.Data.Model != ev.Data.Model {
			t.Errorf("%s: %+v, %v", ev.Data.Model, r, err)
		}
		again := v.Delivery
		again.Sequence += 10
		if known, err := s.Known(testContext(t), ev.Identity(), again); !known || err != nil {
			t.Errorf("%s sent again: known %t, %v", ev.Data.Model, known, err)
		}
		if score, err := s.ScoreByID(testContext(t), ev.Identity()); err != nil || score.Event.Data.Model != ev.Data.Model {
			t.Errorf("%s: %v", ev.Data.Model, err)
		}
	}
	if _, err := s.ScoreByID(testContext(t), schema.Identity{ID: "one"}); err == nil ||
		!strings.Contains(err.Error(), "name the model") {
		t.Errorf("an id of two models: %v", err)
	}
	for _, skip := range []string{"fashion-mnist", "other"} {
		ev := event("skipped")
		ev.Data.Model = skip
		v := schema.Verdict{Delivery: delivery(uint64(20+len(skip)), skip), Skip: &schema.Skip{Event: ev, Reason: "noise"}}
		if r := mustRecord(t, s, v); !r.First {
			t.Errorf("skip of %s: %+v", skip, r)
		}
	}
	for table, want := range map[string]int{"scores": 2, "reviews": 2, "skips": 2, "events": 4, "repeats": 2} {
		if n := count(t, conn, `SELECT count(*) FROM decuwatch.`+table+`
			WHERE model IN ('fashion-mnist', 'other')`); n != want {
			t.Errorf("%d rows of %s, want %d", n, table, want)
		}
	}
}

// A dead letter of a message that no worker took is not a verdict on its event: sent again, or redelivered, the event
// is scored. The redelivery takes the dead letter out of the counts of its hour.
func TestUntakenEventsStayOpen(t *testing.T) {
	for _, kind := range []schema.DeadLetterKind{"unknown_model", "orphaned"} {
		s, conn := open(t, postgres.Config{})
		ev := event("one")
		mustRecord(t, s, letter(1, "one", "generation.requested.fashion-mnist", kind, &ev))
		if r := mustRecord(t, s, letter(1, "one", "generation.requested.fashion-mnist", "given_up", &ev)); r.First ||
			r.Reason != string(kind) {
			t.Errorf("%s: a second verdict on the message: %+v", kind, r)
		}
		id := count(t, conn, `SELECT id FROM decuwatch.dead_letters`)
		if _, err := s.Redeliver(testContext(t), int64(id), "alice"); err != nil {
			t.Fatal(err)
		}
		if n := count(t, conn, `SELECT sum(n) FROM decuwatch.outcome_hour_parts WHERE outcome = 'dead_letter'`); n != 0 {
			t.Errorf("%s: %d dead letters are counted after the redelivery", kind, n)
		}
		if n := count(t, conn, `SELECT count(*) FROM (SELECT FROM decuwatch.outcome_hour_parts
			GROUP BY hour HAVING sum(n) <> 0) x`); n != 0 {
			t.Errorf("%s: %d hours are off", kind, n)
		}
		if known, err := s.Known(testContext(t), ev.Identity(), delivery(2, "one")); known || err != nil {
			t.Errorf("%s sent again: known %t, %v", kind, known, err)
		}
		if r := mustRecord(t, s, scoreVerdict(2, "one")); !r.First {
			t.Errorf("%s sent again: %+v", kind, r)
		}
		// Once more while no worker takes the model: it repeats the score.
		if r := mustRecord(t, s, letter(3, "one", "generation.requested.fashion-mnist", kind, &ev)); r.First ||
			r.Outcome != schema.OutcomeScore {
			t.Errorf("%s of an event that is scored: %+v", kind, r)
		}
	}
}

// TestForgottenMessagesAreNotLost checks that reconcile does not count a message as lost if retention deleted its row.
func TestForgottenMessagesAreNotLost(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	var least string
	if err := conn.QueryRow(testContext(t), `SELECT decuwatch.least_retention('events')::text`).Scan(&least); err != nil {
		t.Fatal(err)
	}
	created := time.Now().Add(-365 * 24 * time.Hour).Truncate(time.Microsecond)
	if _, err := s.Position(testContext(t), "GENERATION", created, 0); err != nil {
		t.Fatal(err)
	}
	accounted := func(want uint64) {
		t.Helper()
		if from, known, err := s.AccountedFrom(testContext(t), "GENERATION", created); from != want || !known || err != nil {
			t.Errorf("accounted from %d (%t, %v), want %d", from, known, err, want)
		}
	}
	mustRecord(t, s, scoreVerdict(5, "old"))
	mustRecord(t, s, letter(6, "junk", "generation.requested.fashion-mnist", "invalid", nil))
	accounted(1)
	ages := func(age string) {
		t.Helper()
		sudo(t, conn, `UPDATE decuwatch.events SET recorded_at = now() - interval '`+age+`'`,
			`UPDATE decuwatch.dead_letters SET recorded_at = now() - interval '`+age+`'`)
	}
	ages(least + " -1 minute")
	accounted(1)
	ages(least + " 1 second") // from here on a row may go at any moment
	accounted(7)
	deleted := 0
	if err := conn.QueryRow(testContext(t),
		`SELECT decuwatch.delete_old('events', decuwatch.least_retention('events'))`).Scan(&deleted); err != nil ||
		deleted == 0 {
		t.Fatalf("%d rows deleted, %v", deleted, err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.events`); n != 0 {
		t.Fatalf("%d rows are left", n)
	}
	accounted(7)
}

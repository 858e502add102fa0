package postgres_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

func letter(sequence uint64, message, subject, kind string, ev *schema.Event) schema.Verdict {
	return schema.Verdict{Delivery: delivery(sequence, message), DeadLetter: &schema.DeadLetter{
		Event: ev, Subject: subject, Kind: kind, Field: "data.model", Reason: "is wrong", Payload: []byte(message),
	}}
}

// A dead letter of a message on one subject settles that message, and no event of another subject. An invalid event can
// be sent again, corrected.
func TestDeadLettersClaimOnlyTheirOwn(t *testing.T) {
	for _, c := range []struct{ name, subject, kind string }{
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
			// The server's advisory about the same message comes to another kind, and changes nothing.
			if r := mustRecord(t, s, letter(1, "wrong", c.subject, "given_up", &ev)); r.First || r.Reason != c.kind {
				if r.First {
					t.Errorf("the message has a second verdict: %+v", r)
				}
			}
			if known, err := s.Known(testContext(t), ev.Source, ev.ID, delivery(1, "wrong")); !known || err != nil {
				t.Errorf("the message itself: known %t, %v", known, err)
			}
			// The same bytes on the right subject, and a corrected event.
			for _, message := range []string{"wrong", "right"} {
				if known, err := s.Known(testContext(t), ev.Source, ev.ID, delivery(2, message)); known || err != nil {
					t.Errorf("%s on its own subject: known %t, %v", message, known, err)
				}
			}
			if r := mustRecord(t, s, scoreVerdict(2, "one")); !r.First || r.Outcome != postgres.OutcomeScore {
				t.Errorf("the event on its own subject: %+v", r)
			}
			if n := count(t, conn, `SELECT count(*) FROM decuwatch_views.dead_letters WHERE source = $1 AND event_id = $2`, ev.Source, ev.ID); n != 1 {
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
	n := count(t, conn, `SELECT count(*) FROM decuwatch_views.dead_letters WHERE source = '//studio/render' AND model = 'fashion-mnist'`)
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
		if known, err := s.Known(testContext(t), ev.Source, ev.ID, delivery(6, "one")); !known || err != nil {
			t.Fatalf("a repeat: known %t, %v", known, err)
		}
	}
	if known, err := s.Known(testContext(t), ev.Source, "two", delivery(7, "two")); known || err != nil {
		t.Errorf("a new event: known %t, %v", known, err)
	}
	var invalid *schema.Invalid
	if _, err := s.Known(testContext(t), ev.Source, ev.ID, delivery(8, "another")); !errors.As(err, &invalid) || invalid.Field != "id" {
		t.Errorf("another event's identifier: %v", err)
	}
	if _, err := s.Record(testContext(t), schema.Verdict{Delivery: delivery(8, "another"), Score: score("one", 0.3, 0.1)}); !errors.As(err, &invalid) {
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
	var outcomes []string
	for _, v := range verdicts {
		outcomes = append(outcomes, v.Outcome)
	}
	if want := []string{"score", "repeat", "repeat", "dead_letter"}; err != nil || !slices.Equal(outcomes, want) {
		t.Errorf("outcomes are %v, %v; want %v", outcomes, err, want)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.scores`); n != 1 {
		t.Errorf("%d scores, want 1", n)
	}
}

// A message that has its verdict gets no second one, whatever a later reading of it comes to.
func TestOneVerdictAMessage(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	mustRecord(t, s, scoreVerdict(1, "one"))
	// Read again by stricter rules, it cannot be decoded.
	r := mustRecord(t, s, letter(1, "one", "generation.requested.fashion-mnist", "invalid", nil))
	if r.First || r.Outcome != postgres.OutcomeScore {
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
	if got, err := s.Try(testContext(t), delivery(1, "another stream's"), schema.Tries{}); err != nil || got != (schema.Tries{}) {
		t.Errorf("another message of that sequence: %+v, %v", got, err)
	}
}

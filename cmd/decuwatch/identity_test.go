package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// identityEvent returns an event with the given id as a structured CloudEvent.
func identityEvent(t *testing.T, id, model string) string {
	t.Helper()
	_, payload, err := schema.Encode(schema.Event{
		Source: faultSource, ID: id, Time: time.Now(),
		Data: schema.Generation{Model: model, Class: schema.ClassIndex(0), Seed: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(payload)
}

// put publishes a message and returns its sequence.
func (b *bench) put(subject, payload string) uint64 {
	b.t.Helper()
	ack, err := b.js.Publish(b.t.Context(), subject, []byte(payload))
	if err != nil {
		b.t.Fatal(err)
	}
	return ack.Sequence
}

// advisoriesDone waits until every advisory of the server has been handled.
func (b *bench) advisoriesDone() {
	b.t.Helper()
	b.until("every advisory is acknowledged", func() bool {
		c, err := b.js.Consumer(b.t.Context(), consumers.AdvisoryStream("GENERATION"), "terminated-decuwatch")
		if err != nil {
			return false
		}
		info := c.CachedInfo()
		return info.NumPending == 0 && info.NumAckPending == 0
	})
}

// A message on one subject cannot settle an event on another subject. Each message gets one verdict, even if the
// server sends an advisory about it, and its producer finds the verdict. The event is scored once it is sent on its
// own subject, or corrected.
func TestOneSubjectCannotSilenceAnother(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	w := b.worker()
	b.publish(1)
	b.drained()

	// The victim's event, first on a subject that nobody consumes, then on the subject of another model.
	victim := identityEvent(t, "victim", faultModel)
	b.put("generation.requested.nobody", victim)
	b.put("generation.requested."+faultModel+".deeper", victim)
	foreign := identityEvent(t, "foreign", "other")
	b.put(schema.SubjectGeneration(faultModel), foreign)
	broken := strings.Replace(identityEvent(t, "corrected", faultModel), `"seed":1`, `"seed":-1`, 1)
	b.put(schema.SubjectGeneration(faultModel), broken)
	b.until("each has its dead letter", func() bool {
		return len(b.query("SELECT sequence::text FROM decuwatch.dead_letters")) == 4
	})
	b.drained()
	b.advisoriesDone()
	got := b.query("SELECT sequence || ' ' || kind || ' ' || source || ' ' || event_id " +
		"FROM decuwatch_views.dead_letters WHERE source = '" + faultSource + "' ORDER BY sequence")
	want := []string{
		"2 unknown_model " + faultSource + " victim", "3 unknown_model " + faultSource + " victim",
		"4 invalid " + faultSource + " foreign", "5 invalid " + faultSource + " corrected",
	}
	if !slices.Equal(got, want) {
		t.Errorf("dead letters are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if got := b.query("SELECT event_id FROM decuwatch.events WHERE outcome = 'dead_letter'"); len(got) > 0 {
		t.Errorf("dead letters on the wrong subject claim the events %v", got)
	}

	b.put(schema.SubjectGeneration(faultModel), victim)
	b.put(schema.SubjectGeneration(faultModel), identityEvent(t, "corrected", faultModel))
	b.drained()
	scored := []string{"corrected", "e000001", "victim"}
	if got := b.query("SELECT event_id FROM decuwatch.scores ORDER BY event_id"); !slices.Equal(got, scored) {
		t.Errorf("scored are %v", got)
	}
	got = b.query("SELECT event_id FROM decuwatch.alerts WHERE kind = 'score' ORDER BY event_id")
	if !slices.Equal(got, scored) {
		t.Errorf("alerts are on %v", got)
	}
	w.stop()
	if w := start(t, nil, "reconcile", "--nats.url="+b.natsURL, "--postgres.url="+b.pgURL); w.wait().ExitCode() != 0 {
		t.Errorf("reconcile: %s\n%s", w.cmd.ProcessState, w.tail())
	}
}

// renamed returns the directory of a copy of the tiny ensemble with another name.
func renamed(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(faultEnsemble)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "ensemble.json")
	manifest, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(manifest), `"name": "`+faultModel+`"`, `"name": "`+name+`"`, 1)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Valid events of another model do not affect an event with the same source and id, whether they come before or after
// it. The same bytes count as a repeat. Events that came before their model was served are scored when they come
// again.
func TestOneModelCannotSilenceAnother(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	w := b.worker()
	ours, theirs := schema.SubjectGeneration(faultModel), schema.SubjectGeneration("other")
	early, resent := identityEvent(t, "early", "other"), identityEvent(t, "resent", "other")
	b.put(theirs, early)
	b.put(theirs, resent)
	b.until("nobody takes the other model's events", func() bool {
		return len(b.query("SELECT kind FROM decuwatch.dead_letters WHERE kind = 'unknown_model'")) == 2
	})
	w.stop()

	b.flags = append(b.flags, "-e", renamed(t, "other"))
	w = b.worker()
	scored := func(want ...string) {
		t.Helper()
		b.until(strings.Join(want, ", ")+" are scored", func() bool {
			got := b.query("SELECT event_id || ' ' || model FROM decuwatch.scores ORDER BY 1")
			return slices.Equal(got, want)
		})
	}
	b.put(theirs, resent)
	redeliver := start(t, nil, "redeliver", "--model=other", "--kind=unknown_model", "--apply", "--to=1",
		"--nats.url="+b.natsURL, "--postgres.url="+b.pgURL)
	if redeliver.wait().ExitCode() != 0 {
		t.Errorf("redeliver: %s", redeliver.tail())
	}
	scored("early other", "resent other")

	attacks, victims := map[string]string{}, map[string]string{}
	for _, id := range []string{"before", "later"} {
		attacks[id], victims[id] = identityEvent(t, id, "other"), identityEvent(t, id, faultModel)
	}
	b.put(theirs, attacks["before"])
	b.put(ours, victims["later"])
	scored("before other", "early other", "later "+faultModel, "resent other")
	for range 2 { // the second time all are repeats
		b.put(theirs, attacks["before"])
		b.put(ours, victims["before"])
		b.put(theirs, attacks["later"])
		b.put(ours, victims["later"])
	}
	scored("before other", "before "+faultModel, "early other", "later other", "later "+faultModel, "resent other")
	b.until("the others are repeats", func() bool {
		return len(b.query("SELECT model FROM decuwatch.repeats")) == 6
	})
	if got := b.query("SELECT kind FROM decuwatch.dead_letters WHERE kind <> 'unknown_model'"); len(got) > 0 {
		t.Errorf("dead letters: %v", got)
	}
	alerted := b.query("SELECT event_id FROM decuwatch.alerts WHERE kind = 'score' ORDER BY 1")
	if got := alerted; !slices.Equal(got, []string{"before", "later"}) {
		t.Errorf("alerts are on %v", got)
	}
	w.stop()
	if w := start(t, nil, "reconcile", "--nats.url="+b.natsURL, "--postgres.url="+b.pgURL); w.wait().ExitCode() != 0 {
		t.Errorf("reconcile: %s\n%s", w.cmd.ProcessState, w.tail())
	}
}

// Events that have their verdict cost no more work if their consumer is deleted or restored, or if their producer
// repeats them. Every sequence is settled.
func TestKnownEventsCostNoWork(t *testing.T) {
	s := natstest.Start(t)
	b := newBench(t, s.URL(), pgtest.URL(t))
	b.stream()
	w := b.worker()
	repeat := identityEvent(t, "repeated", faultModel)
	b.put(schema.SubjectGeneration(faultModel), repeat)
	b.publish(20)
	b.drained()
	w.stop()
	if err := b.js.DeleteConsumer(t.Context(), "GENERATION", consumers.Durable(faultModel)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		b.put(schema.SubjectGeneration(faultModel), repeat)
	}
	w = b.worker()
	b.drained()
	_, metrics := get(t, metricsAddress(t, w)+"/metrics")
	if want := `decuwatch_stage_seconds_count{stage="score"} 0`; !strings.Contains(metrics, want) {
		t.Errorf("known events were scored again: no %s", want)
	}
	if n := b.scored(); n != 21 {
		t.Errorf("%d scores, want 21", n)
	}
	settled, err := b.store.VerdictsBySequence(t.Context(), "GENERATION", 1, 100)
	if err != nil || len(settled) != 23 {
		t.Errorf("settled are %v, %v; want 1 to 23", settled, err)
	}
	if got := b.query("SELECT sequence::text FROM decuwatch.repeats"); len(got) != 2 {
		t.Errorf("repeats are %v, want two", got)
	}
	w.stop()
}

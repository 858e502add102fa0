package postgres_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Beat returns only the workers that score a model otherwise, and which of them are older.
func TestBeat(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	one, two := strings.Repeat("1", 64), strings.Repeat("2", 64)
	beat := func(id string, models ...postgres.WorkerModel) []postgres.Worker {
		t.Helper()
		others, _, err := s.Beat(ctx, id, "host of "+id, models, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return others
	}
	scores := func(model, digest string, shadows ...string) postgres.WorkerModel {
		m := postgres.WorkerModel{Model: model, EnsembleDigest: digest, Settings: "s", Shadows: []string{}}
		m.Shadows = append(m.Shadows, shadows...)
		return m
	}
	a, b, other := scores("a", one), scores("b", one), scores("a", two)
	for range 2 {
		for _, id := range []string{"first", "twin"} {
			if others := beat(id, a, b); len(others) != 0 {
				t.Errorf("%s: %+v", id, others)
			}
		}
	}
	if others := beat("stranger", other); len(others) != 2 || !others[0].Older || others[0].Host != "host of first" ||
		!reflect.DeepEqual(others[0].WorkerModel, a) {
		t.Errorf("the newer worker sees %+v", others)
	}
	if others := beat("first", a, b); len(others) != 1 || others[0].Older ||
		!reflect.DeepEqual(others[0].WorkerModel, other) {
		t.Errorf("the older worker sees %+v", others)
	}
	if _, err := conn.Exec(ctx, `UPDATE decuwatch.workers SET seen_at = seen_at - interval '2 minutes'
		WHERE id = 'stranger'`); err != nil {
		t.Fatal(err)
	}
	if others := beat("first", a, b); len(others) != 0 {
		t.Errorf("a worker that says nothing counts: %+v", others)
	}
	// A shadow is no mistake, whichever of the two workers serves it.
	shadowing := scores("a", two, one)
	if others := beat("next", shadowing); len(others) != 0 {
		t.Errorf("a worker with the old ensemble as its shadow sees %+v", others)
	}
	if others := beat("first", a, b); len(others) != 0 {
		t.Errorf("the old worker sees %+v", others)
	}
	serving, err := s.Serving(ctx, "a", time.Minute)
	if err != nil || len(serving) != 3 || !serving[1].Serves(one) || serving[0].Serves(two) {
		t.Errorf("workers of a model: %+v, %v", serving, err)
	}
	if err := s.Leave(ctx, "twin"); err != nil {
		t.Fatal(err)
	}
	beat("first", a, b)
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.workers WHERE id = 'twin'`); n != 0 {
		t.Error("a worker that left is remembered")
	}
}

// Beat fails if any table that a verdict writes is missing.
func TestBeatNeedsEveryTable(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	for _, table := range []string{"events", "scores", "alerts", "outbox", "reviews", "tries"} {
		if _, err := conn.Exec(ctx, `ALTER TABLE decuwatch.`+table+` RENAME TO gone`); err != nil {
			t.Fatal(err)
		}
		_, _, err := s.Beat(ctx, "w", "h", nil, time.Minute)
		if err == nil || !strings.Contains(err.Error(), "no right to insert: "+table) {
			t.Errorf("without %s: %v", table, err)
		}
		if _, err := conn.Exec(ctx, `ALTER TABLE decuwatch.gone RENAME TO `+table); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := s.Beat(ctx, "w", "h", nil, time.Minute); err != nil {
		t.Error(err)
	}
}

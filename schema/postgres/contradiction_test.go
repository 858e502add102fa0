package postgres_test

import (
	"errors"
	"sync"
	"testing"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// critical returns a critical threshold of the class of [threshold].
func critical(value float64) schema.Threshold {
	th := threshold(value)
	th.Severity = schema.SeverityCritical
	return th
}

func TestContradictionsAreRefused(t *testing.T) {
	s, conn := open(t, postgres.Config{})
	ctx := testContext(t)
	if _, err := s.SetThreshold(ctx, threshold(0.5)); err != nil {
		t.Fatal(err)
	}
	change := postgres.ThresholdChange{Kind: postgres.ChangeManual, SetBy: "ada", Reason: "test",
		Thresholds: []schema.Threshold{critical(0.4)}}
	if _, err := s.SetThresholds(ctx, change); !errors.Is(err, schema.ErrContradiction) {
		t.Errorf("critical below warn: %v", err)
	}
	if n := count(t, conn, `SELECT count(*) FROM decuwatch.threshold_changes`); n != 1 {
		t.Errorf("%d changes, want 1: a refused one leaves nothing", n)
	}
	if _, err := s.SetThreshold(ctx, critical(0.6)); err != nil {
		t.Fatal(err)
	}

	// A version without the check has left a contradiction. It can be corrected, but a rollback does not restore it.
	if _, err := conn.Exec(ctx, `WITH c AS (INSERT INTO decuwatch.threshold_changes (kind, set_by, reason)
		VALUES ('manual', 'old', 'old') RETURNING id)
		INSERT INTO decuwatch.thresholds (change_id, model, ensemble_digest, settings, measurement, scope, class_index,
		severity, value, withdrawn, origin, n, set_by, reason, set_at)
		SELECT c.id, model, ensemble_digest, settings, measurement, scope, class_index, severity, 0.1, false, origin, n,
		set_by, reason, now()
		FROM decuwatch.thresholds, c WHERE severity = 'critical'`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SetThreshold(ctx, critical(0.7)); err != nil {
		t.Fatalf("mending a contradiction: %v", err)
	}
	if _, err := s.RollbackThresholds(ctx, "ada", "back"); !errors.Is(err, schema.ErrContradiction) {
		t.Errorf("a rollback to a contradiction: %v", err)
	}
	now, err := s.Thresholds(ctx)
	if err != nil || len(now) != 2 || now[0].Value != 0.5 || now[1].Value != 0.7 {
		t.Errorf("%+v %v", now, err)
	}
}

// Two writers at a time cannot contradict each other, even if each agrees with what it read.
func TestWritersDoNotContradictEachOther(t *testing.T) {
	s, _ := open(t, postgres.Config{MaxConns: 8})
	ctx := testContext(t)
	const classes = 40
	for class := range classes {
		var wg sync.WaitGroup
		var errs [2]error
		for i, th := range []schema.Threshold{threshold(0.5), critical(0.4)} {
			th.Class = &class
			wg.Go(func() { _, errs[i] = s.SetThreshold(ctx, th) })
		}
		wg.Wait()
		refused := 0
		for _, err := range errs {
			switch {
			case errors.Is(err, schema.ErrContradiction):
				refused++
			case err != nil:
				t.Fatal(err)
			}
		}
		if refused != 1 {
			t.Errorf("class %d: %d of two changes were refused, want 1: %v", class, refused, errs)
		}
	}
	if now, err := s.Thresholds(ctx); err != nil || len(now) != classes {
		t.Errorf("%d thresholds, want %d: %v", len(now), classes, err)
	}
}

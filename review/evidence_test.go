package review_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"image/png"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/decuwatch/decuwatch/review"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// counting counts what an engine gathers, and fails as often as it is told to.
type counting struct {
	*scoring.Engine
	mu   sync.Mutex
	keys map[string]int
	fail error
}

func (c *counting) Evidence(ctx context.Context, r scoring.Request) (scoring.Evidence, error) {
	c.mu.Lock()
	c.keys[r.Key]++
	err := c.fail
	c.mu.Unlock()
	if err != nil {
		return scoring.Evidence{}, err
	}
	return c.Engine.Evidence(ctx, r)
}

func (c *counting) set(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail = err
}

func (b *bench) evidence(id string) string {
	b.t.Helper()
	r, err := b.store.ReviewByID(b.t.Context(), id)
	if err != nil {
		b.t.Fatal(err)
	}
	return r.Evidence
}

// Three workers in two processes' stores: every job is done exactly once.
func TestEvidenceIsMadeOnce(t *testing.T) {
	b := newBench(t, tiny)
	c := &counting{Engine: b.engine, keys: map[string]int{}}
	const n = 12
	var ids []string
	for i := range n {
		r := request{class: i % 2, seed: uint64(i), alert: schema.SeverityWarn}
		if i%4 == 3 {
			r.alert, r.sampled = "", true
		}
		_, id := b.record(r)
		ids = append(ids, id)
	}
	for _, store := range []*postgres.Store{b.store, b.open()} {
		w, err := review.NewWorker(store, []review.Gatherer{c}, review.WorkerConfig{Workers: 2})
		if err != nil {
			t.Fatal(err)
		}
		running(t, w.Run)
	}
	until(t, "all evidence is there", func() bool {
		s, err := b.store.EvidenceStats(t.Context())
		return err == nil && s.Pending == 0
	})
	// A verdict that comes now is announced to the workers that wait.
	_, late := b.record(request{class: 1, seed: 99, alert: schema.SeverityCritical})
	until(t, "the late one's evidence", func() bool { return b.evidence(late) == postgres.EvidenceDone })
	c.mu.Lock()
	for key, times := range c.keys {
		if times != 1 {
			t.Errorf("%q was gathered %d times", key, times)
		}
	}
	if len(c.keys) != n+1 {
		t.Errorf("%d requests were gathered, want %d", len(c.keys), n+1)
	}
	c.mu.Unlock()
	m := b.engine.Ensemble()
	for _, id := range ids {
		files, err := b.store.EvidenceFiles(t.Context(), id)
		if err != nil || len(files) != m.Components+2+4 {
			t.Fatalf("%s has %d files, want %d images, a map, the numbers and 4 reference images, %v", id, len(files),
				m.Components, err)
		}
		for _, f := range files {
			file, err := b.store.EvidenceFile(t.Context(), id, f.Name)
			if err != nil {
				t.Fatal(err)
			}
			if f.ContentType == "image/png" {
				picture, err := png.Decode(bytes.NewReader(file.Body))
				if err != nil || picture.Bounds().Dx() != m.Image.Width || picture.Bounds().Dy() != m.Image.Height {
					t.Errorf("%s: %v, %v", f.Name, picture, err)
				}
				continue
			}
			var numbers review.Numbers
			if err := json.Unmarshal(file.Body, &numbers); err != nil || !numbers.Agrees || len(numbers.Trajectory) == 0 ||
				len(numbers.Similarity) != m.Components {
				t.Errorf("numbers %+v, %v", numbers, err)
			}
		}
	}
}

// A worker that died holds its job for the lease only; what it would store late changes nothing.
func TestEvidenceOfADeadWorker(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	digests := []string{b.engine.Ensemble().Digest}
	if _, found, err := b.store.NextEvidence(t.Context(), []string{strings.Repeat("0", 64)}, time.Minute); found ||
		err != nil {
		t.Errorf("a job of another ensemble: %v, %v", found, err)
	}
	dead, found, err := b.store.NextEvidence(t.Context(), digests, time.Millisecond)
	if !found || err != nil || dead.ReviewID != id || dead.Attempt != 1 || dead.Score == nil {
		t.Fatalf("%+v, %v, %v", dead, found, err)
	}
	c := &counting{Engine: b.engine, keys: map[string]int{}}
	w, err := review.NewWorker(b.store, []review.Gatherer{c}, review.WorkerConfig{Poll: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	stop := running(t, w.Run)
	until(t, "another worker's evidence", func() bool { return b.evidence(id) == postgres.EvidenceDone })
	stop()
	if stored, err := b.store.StoreEvidence(t.Context(), dead,
		[]postgres.EvidenceFile{{Name: "image-0", ContentType: "image/png", Body: []byte("late")}}); stored || err != nil {
		t.Errorf("the dead worker's evidence was stored: %v, %v", stored, err)
	}
	if f, err := b.store.EvidenceFile(t.Context(), id, "image-0"); err != nil || bytes.Equal(f.Body, []byte("late")) {
		t.Errorf("%q, %v", f.Body, err)
	}
}

// A job whose every attempt took its process down with it fails for good; one that a stop broke off keeps its attempts.
func TestEvidenceThatKillsItsWorker(t *testing.T) {
	b := newBench(t, tiny)
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	digests := []string{b.engine.Ensemble().Digest}
	take := func(attempt int) postgres.EvidenceJob {
		t.Helper()
		var job postgres.EvidenceJob
		until(t, "the job is due", func() bool {
			var found bool
			var err error
			if job, found, err = b.store.NextEvidence(t.Context(), digests, time.Millisecond); err != nil {
				t.Fatal(err)
			}
			return found
		})
		if job.Attempt != attempt {
			t.Fatalf("attempt %d, want %d", job.Attempt, attempt)
		}
		return job
	}
	take(1)
	if err := b.store.ReturnEvidence(t.Context(), take(2)); err != nil {
		t.Fatal(err)
	}
	take(2)
	c := &counting{Engine: b.engine, keys: map[string]int{}}
	w, err := review.NewWorker(b.store, []review.Gatherer{c}, review.WorkerConfig{MaxAttempts: 2, Poll: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	running(t, w.Run)
	until(t, "the evidence has failed", func() bool { return b.evidence(id) == postgres.EvidenceFailed })
	if r, err := b.store.ReviewByID(t.Context(), id); err != nil ||
		!strings.Contains(r.EvidenceError, "without a result") || len(c.keys) != 0 {
		t.Errorf("%q, %d gathered, %v", r.EvidenceError, len(c.keys), err)
	}
}

// Failures are retried up to the bound, then shown; a person can have them tried again.
func TestEvidenceFails(t *testing.T) {
	b := newBench(t, tiny)
	c := &counting{Engine: b.engine, keys: map[string]int{}, fail: errors.New("the device is gone")}
	_, id := b.record(request{class: 0, seed: 1, alert: schema.SeverityWarn})
	reg := prometheus.NewRegistry()
	w, err := review.NewWorker(b.store, []review.Gatherer{c},
		review.WorkerConfig{MaxAttempts: 3, RetryDelay: time.Millisecond, Poll: time.Millisecond, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	running(t, w.Run)
	until(t, "the evidence has failed", func() bool { return b.evidence(id) == postgres.EvidenceFailed })
	r, err := b.store.ReviewByID(t.Context(), id)
	if err != nil || r.EvidenceAttempts != 3 || r.EvidenceError != "the device is gone" {
		t.Errorf("%d attempts, %q, %v", r.EvidenceAttempts, r.EvidenceError, err)
	}
	until(t, "the metrics say so", func() bool {
		return testutil.CollectAndCompare(reg,
			strings.NewReader("# HELP decuwatch_evidence_attempts_total "+
				`Attempts to make the evidence of a review: done, retried or failed for good.
# TYPE decuwatch_evidence_attempts_total counter
decuwatch_evidence_attempts_total{outcome="done"} 0
decuwatch_evidence_attempts_total{outcome="failed"} 1
decuwatch_evidence_attempts_total{outcome="retried"} 2
# HELP decuwatch_evidence_failed Reviews whose evidence failed for good.
# TYPE decuwatch_evidence_failed gauge
decuwatch_evidence_failed 1
`), "decuwatch_evidence_attempts_total", "decuwatch_evidence_failed") == nil
	})
	c.set(nil)
	if err := b.store.RetryEvidence(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	until(t, "the evidence after another try", func() bool { return b.evidence(id) == postgres.EvidenceDone })
	if err := b.store.RetryEvidence(t.Context(), id); !errors.Is(err, postgres.ErrNotFound) {
		t.Errorf("retry of what is done: %v", err)
	}
	// A permanent failure is not tried again.
	c.set(scoring.ErrNoise)
	_, broken := b.record(request{class: 0, seed: 2, alert: schema.SeverityWarn})
	until(t, "the broken one has failed", func() bool { return b.evidence(broken) == postgres.EvidenceFailed })
	if r, err := b.store.ReviewByID(t.Context(), broken); err != nil || r.EvidenceAttempts != 1 {
		t.Errorf("%d attempts, %v", r.EvidenceAttempts, err)
	}
	// Evidence past its retention goes, its review stays.
	conn, err := pgx.Connect(t.Context(), b.url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(),
		`UPDATE decuwatch.evidence SET made_at = made_at - interval '91 days'`); err != nil {
		t.Fatal(err)
	}
	if err := b.store.MaintainOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	if files, err := b.store.EvidenceFiles(t.Context(), id); err != nil || len(files) != 0 {
		t.Errorf("%d files after their retention, %v", len(files), err)
	}
	if b.evidence(id) != postgres.EvidenceDone {
		t.Error("the review went with its evidence")
	}
}

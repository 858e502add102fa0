package rescore

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

func TestMain(m *testing.M) {
	natstest.RunIfChild()
	goleak.VerifyTestMain(m)
}

// A target takes all the time while live work rests, and its share of it while live work is busy.
func TestPacer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var busy atomic.Bool
		p := &pacer{busy: busy.Load, share: 0.1}
		work := func(n int) time.Duration {
			began := time.Now()
			for range n {
				end := p.begin(t.Context())
				time.Sleep(time.Second)
				end(time.Second)
			}
			return time.Since(began)
		}
		if took := work(10); took != 10*time.Second {
			t.Errorf("while live work rests, ten seconds of work took %s", took)
		}
		busy.Store(true)
		work(1)
		if took := work(10); took < 99*time.Second || took > 101*time.Second {
			t.Errorf("while live work is busy, ten seconds of work at a tenth took %s", took)
		}
		busy.Store(false)
		if took := work(10); took != 10*time.Second {
			t.Errorf("after live work, ten seconds of work took %s", took)
		}
	})
}

// store is a store in memory. Its live scores are of class 0.
type store struct {
	known    atomic.Bool
	recorded chan schema.Rescore
	failed   chan postgres.RescoreFailure
}

func newStore() *store {
	return &store{recorded: make(chan schema.Rescore, 10), failed: make(chan postgres.RescoreFailure, 10)}
}

func (s *store) RescoreSource(_ context.Context, e postgres.StoredEvent, of schema.Series,
) (*schema.Score, bool, error) {
	if e.ID == "gone" {
		return nil, false, postgres.ErrNotFound
	}
	return &schema.Score{Event: schema.Event{Source: e.Source, ID: e.ID, Time: e.Time,
		Data: schema.Generation{Model: of.Model}}, InclusionProbability: 0.25}, s.known.Load(), nil
}

func (s *store) RecordRescore(_ context.Context, r schema.Rescore) (bool, error) {
	s.recorded <- r
	return true, nil
}

func (s *store) FailRescore(_ context.Context, f postgres.RescoreFailure) error {
	s.failed <- f
	return nil
}

func (s *store) FeedShadow(context.Context, string, string, int, func([]postgres.StoredEvent) error,
) (time.Duration, bool, error) {
	return 0, false, nil
}

// scorer fails on the first attempts on a request.
type scorer struct {
	fails    atomic.Int64
	priority atomic.Int64
}

func (s *scorer) Validate(scoring.Request) error { return nil }
func (s *scorer) Rows(scoring.Request) int       { return 1 }
func (s *scorer) Score(_ context.Context, r scoring.Request) (scoring.Result, error) {
	s.priority.Store(int64(r.Priority))
	if s.fails.Add(-1) >= 0 {
		return scoring.Result{}, errors.New("no luck")
	}
	return scoring.Result{}, nil
}

// decider raises one alert on everything.
type decider struct{}

func (decider) Decide(schema.Score) alerts.Decision {
	return alerts.Decision{Alerts: []schema.Alert{{ID: "a"}}}
}

func receive[T any](t *testing.T, from <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(time.Minute):
		t.Fatalf("%s: nothing came", what)
		panic("unreachable")
	}
}

// Jobs end with a score or with the reason why there is none. What may help is tried again, behind live work.
func TestJobs(t *testing.T) {
	js := natstest.Start(t).JetStream()
	st, sc := newStore(), &scorer{}
	of := schema.Series{Model: "m", EnsembleDigest: strings.Repeat("1", 64), Settings: "s"}
	w, err := NewWorker(js, st, decider{}, []Target{{
		Model: monitor.Model{Scorer: sc, Classes: []string{"zero"}}, Series: of,
	}}, Config{Workers: 2, MaxTries: 2}, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	if _, err := w.queue.ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	give := func(id string, purpose schema.Purpose, alert bool) {
		t.Helper()
		err := w.queue.publish(t.Context(), of, "run", []Job{{Run: "run", Purpose: purpose, Time: time.Now(), Source: "s",
			ID: id, Alert: alert}})
		if err != nil {
			t.Fatal(err)
		}
	}
	give("quiet", schema.PurposeRescore, false)
	r := receive(t, st.recorded, "a score")
	if r.Purpose != schema.PurposeRescore || len(r.Alerts) != 0 || r.Score.InclusionProbability != 0.25 ||
		scoring.Priority(sc.priority.Load()) != scoring.Background {
		t.Errorf("%+v, priority %d", r, sc.priority.Load())
	}
	give("loud", schema.PurposeRescore, true)
	if r := receive(t, st.recorded, "a score with an alert"); len(r.Alerts) != 1 {
		t.Errorf("%+v", r)
	}
	give("shadow", schema.PurposeShadow, true)
	if r := receive(t, st.recorded, "a score of a shadow"); len(r.Alerts) != 0 {
		t.Errorf("a shadow raises %+v", r.Alerts)
	}
	give("gone", schema.PurposeRescore, false)
	if f := receive(t, st.failed, "a failure"); f.Kind != failureGone || f.Run != "run" || f.Event.ID != "gone" {
		t.Errorf("%+v", f)
	}
	sc.fails.Store(1)
	give("unlucky once", schema.PurposeRescore, false)
	if r := receive(t, st.recorded, "the second attempt"); r.Score.Event.ID != "unlucky once" {
		t.Errorf("%+v", r)
	}
	sc.fails.Store(100)
	give("unlucky", schema.PurposeRescore, false)
	if f := receive(t, st.failed, "the last failure"); f.Kind != "failed" || !strings.Contains(f.Reason, "no luck") {
		t.Errorf("%+v", f)
	}
	natstest.Until(t, "every job is acknowledged", func() bool {
		n, err := w.queue.waiting(t.Context(), of, "run")
		return err == nil && n == 0
	})
	if _, err := js.Publish(t.Context(), subject(of, "run"), []byte("{")); err != nil {
		t.Fatal(err)
	}
	natstest.Until(t, "a malformed job is removed", func() bool {
		n, err := w.queue.waiting(t.Context(), of, "run")
		return err == nil && n == 0
	})
	cancel()
	if err := receive(t, ended, "the end"); err != nil {
		t.Error(err)
	}
}

// A stream that would not hand each job to one worker is refused by name.
func TestStreamOfAnotherKindIsRefused(t *testing.T) {
	js := natstest.Start(t).JetStream()
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "RESCORE", Subjects: []string{subjectPrefix + ">"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newQueue(js, Config{}).ensure(t.Context()); !errors.Is(err, ErrStreamConfig) ||
		!strings.Contains(err.Error(), "RESCORE: retention is") {
		t.Errorf("error is %v", err)
	}
}

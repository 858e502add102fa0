package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// Stages at which DECUWATCH_FAILPOINT kills the process, in the order of an event's way.
const (
	failDelivered  = "delivered"  // decoded and admitted, nothing done
	failScored     = "scored"     // the score is computed
	failDecided    = "decided"    // the alerts are decided
	failCommitting = "committing" // the commit is under way: it may or may not happen
	failCommitted  = "committed"  // committed, not acknowledged
	failBuried     = "buried"     // the dead letter is committed, its message not terminated
	failPublishing = "publishing" // an alert is taken from the outbox, not published
	failPublished  = "published"  // an alert is published, the outbox does not know
)

// failpoints lists them.
func failpoints() []string {
	return []string{failDelivered, failScored, failDecided, failCommitting, failCommitted, failBuried, failPublishing, failPublished}
}

// failpoint kills this process, as a power failure would, the n-th time that a stage is passed. A nil failpoint does
// nothing. It exists for tests of what a killed process leaves behind.
type failpoint struct {
	stage string
	left  atomic.Int64
}

// newFailpoint reads "stage" or "stage:n"; "" is none.
func newFailpoint(text string) (*failpoint, error) {
	if text == "" {
		return nil, nil
	}
	stage, number, counted := strings.Cut(text, ":")
	n := 1
	if counted {
		var err error
		if n, err = strconv.Atoi(number); err != nil || n < 1 {
			return nil, usage("DECUWATCH_FAILPOINT: %q is not a number of passes from 1", number)
		}
	}
	for _, known := range failpoints() {
		if stage == known {
			f := &failpoint{stage: stage}
			f.left.Store(int64(n))
			return f, nil
		}
	}
	return nil, usage("DECUWATCH_FAILPOINT: %q is not one of %s", stage, strings.Join(failpoints(), ", "))
}

// pass kills the process where the stage's turn has come.
func (f *failpoint) pass(stage string) {
	if f == nil || f.stage != stage || f.left.Add(-1) != 0 {
		return
	}
	fmt.Fprintf(os.Stderr, "failpoint: killed at %s\n", stage)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // the signal is on its way
}

// The wrappers below put the stages between the parts, which know nothing of them.

type failingHandler struct {
	*monitor.Monitor
	*failpoint
}

var (
	_ consumers.Handler     = failingHandler{}
	_ consumers.DeadLetters = failingHandler{}
)

func (h failingHandler) Handle(ctx context.Context, ev schema.Event, d schema.Delivery) error {
	h.pass(failDelivered)
	err := h.Monitor.Handle(ctx, ev, d)
	if err == nil {
		h.pass(failCommitted)
	}
	return err
}

func (h failingHandler) DeadLetter(ctx context.Context, v schema.Verdict) error {
	err := h.Monitor.DeadLetter(ctx, v)
	if err == nil {
		h.pass(failBuried)
	}
	return err
}

type failingScorer struct {
	monitor.Scorer
	*failpoint
}

func (s failingScorer) Score(ctx context.Context, r scoring.Request) (scoring.Result, error) {
	result, err := s.Scorer.Score(ctx, r)
	if err == nil {
		s.pass(failScored)
	}
	return result, err
}

type failingDecider struct {
	monitor.Decider
	*failpoint
}

func (d failingDecider) Decide(s schema.Score) alerts.Decision {
	decision := d.Decider.Decide(s)
	d.pass(failDecided)
	return decision
}

type failingRecorder struct {
	monitor.Recorder
	*failpoint
}

func (r failingRecorder) Record(ctx context.Context, v schema.Verdict) (bool, error) {
	if r.failpoint != nil && r.stage == failCommitting && r.left.Add(-1) == 0 {
		// The kill races the commit, as it would in life.
		r.left.Store(1)
		go r.pass(failCommitting)
	}
	return r.Recorder.Record(ctx, v)
}

type failingSink struct {
	alerts.Sink
	*failpoint
}

func (s failingSink) Send(ctx context.Context, m schema.OutboxMessage) error {
	s.pass(failPublishing)
	err := s.Sink.Send(ctx, m)
	if err == nil {
		s.pass(failPublished)
	}
	return err
}

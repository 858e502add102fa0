package rescore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// ErrNotServed is returned if no worker scores with the ensemble.
var ErrNotServed = errors.New("no worker serves the ensemble")

const (
	pollEvery = 250 * time.Millisecond
	lookEvery = 5 * time.Second  // at the workers
	aloneMost = time.Minute      // without any worker, after which a run gives up
	seen      = 20 * time.Second // how long a silent worker counts as running
	page      = 1000             // events that are read at a time
	ahead     = 256              // events of a run that wait in the queue at most
)

// Options say which stored events are scored again, and by what.
type Options struct {
	Query postgres.RescoreQuery
	Share float64 // of these events, 0 to 1; their identity decides which
	Alert bool    // scores may raise alerts
}

// Progress is how far a run has come.
type Progress struct {
	Done  int // events that need no more work
	Total int
}

// Run is one re-score. It holds no state of its own: a run that was broken off is taken up by another with the same
// options, because events that have their score are left out.
type Run struct {
	id      string
	queue   *queue
	store   *postgres.Store
	options Options
	// Progress is called now and then. May be nil.
	Progress func(Progress)
}

// NewRun returns a run that nothing was done for yet.
func NewRun(js jetstream.JetStream, store *postgres.Store, c Config, o Options) *Run {
	return &Run{id: uuid.NewString(), queue: newQueue(js, c), store: store, options: o}
}

// events calls f with the events of the run that have no score yet, page by page.
func (r *Run) events(ctx context.Context, f func([]postgres.StoredEvent) error) error {
	var after postgres.StoredEvent
	for {
		found, err := r.store.RescoreCandidates(ctx, r.options.Query, after, page)
		if err != nil || len(found) == 0 {
			return err
		}
		after = found[len(found)-1]
		if err := f(found); err != nil {
			return err
		}
	}
}

// Count returns how many events have no score yet.
func (r *Run) Count(ctx context.Context) (n int, err error) {
	err = r.events(ctx, func(events []postgres.StoredEvent) error {
		for _, e := range events {
			if drawn(domain, e, r.options.Share) {
				n++
			}
		}
		return nil
	})
	return n, err
}

// domain makes the share of a re-score independent of other shares.
const domain = "rescore"

// Served returns nil if a worker scores with the ensemble, live or as a shadow. Otherwise it is an ErrNotServed that
// says what the workers of the model score with.
func Served(ctx context.Context, store *postgres.Store, of schema.Series) error {
	workers, err := store.Serving(ctx, of.Model, seen)
	if err != nil {
		return err
	}
	others := "no worker scores this model"
	for _, w := range workers {
		if w.Serves(of.EnsembleDigest) {
			return nil
		}
		others = fmt.Sprintf("%s scores it with %s", w.Host, w.EnsembleDigest)
	}
	return fmt.Errorf("%w %s of %s (%s): start one with it in scoring.ensembles or scoring.shadows", ErrNotServed,
		of.EnsembleDigest, of.Model, others)
}

// Workers returns the workers that score a model now.
func Workers(ctx context.Context, store *postgres.Store, model string) ([]postgres.Worker, error) {
	return store.Serving(ctx, model, seen)
}

// Live returns the series of the ensemble that the workers score a model with. It fails if there are none, or two.
func Live(ctx context.Context, store *postgres.Store, model string) (of schema.Series, err error) {
	workers, err := store.Serving(ctx, model, seen)
	if err != nil {
		return of, err
	}
	for _, w := range workers {
		is := schema.Series{Model: model, EnsembleDigest: w.EnsembleDigest, Settings: w.Settings}
		if of != (schema.Series{}) && of != is {
			return of, settings.Errorf("the workers score %s with %s (%s) and with %s (%s): name one with --ensemble", model,
				of.EnsembleDigest, of.Settings, is.EnsembleDigest, is.Settings)
		}
		of = is
	}
	if of == (schema.Series{}) {
		return of, fmt.Errorf("%w of %s: start a worker", ErrNotServed, model)
	}
	return of, nil
}

// Estimate is what a run costs.
type Estimate struct {
	Events        int     `json:"events"`
	Rows          float64 `json:"rows_per_event"`  // 0 if the ensemble has no score yet
	RowsPerSecond float64 `json:"rows_per_second"` // measured in the last day; 0 if it was not
}

// Time returns how long the run takes at the measured rate.
func (e Estimate) Time() time.Duration {
	return time.Duration(e.Rows * float64(e.Events) / e.RowsPerSecond * float64(time.Second))
}

// Estimate returns what the run costs. Nothing is changed.
func (r *Run) Estimate(ctx context.Context) (e Estimate, err error) {
	if e.Events, err = r.Count(ctx); err != nil {
		return e, err
	}
	e.Rows, e.RowsPerSecond, err = r.store.RescoreCost(ctx, r.options.Query.Series)
	return e, err
}

// Do gives the events of the run to the workers and returns when all are done. If ctx ends, what still waits in the
// queue is taken back; what was scored stays. It returns how many events were done, and what could not be scored.
func (r *Run) Do(ctx context.Context) (done int, failed []postgres.RescoreFailures, err error) {
	of := r.options.Query.Series
	if err := Served(ctx, r.store, of); err != nil {
		return 0, nil, err
	}
	total, err := r.Count(ctx)
	if err != nil || total == 0 {
		return 0, nil, err
	}
	given := 0
	alone := watch{run: r, seen: time.Now()}
	// wait returns when at most that many events of the run wait in the queue.
	wait := func(most int) error {
		for {
			waiting, err := r.queue.waiting(ctx, of, r.id)
			if err != nil {
				return err
			}
			done = given - waiting
			if r.Progress != nil {
				r.Progress(Progress{done, max(total, given)})
			}
			if waiting <= most {
				return nil
			}
			if err := alone.look(ctx); err != nil {
				return err
			}
			backoff.Sleep(ctx, pollEvery)
		}
	}
	err = r.events(ctx, func(events []postgres.StoredEvent) error {
		list := jobs(events, Job{Run: r.id, Purpose: schema.PurposeRescore, Alert: r.options.Alert}, domain,
			r.options.Share)
		for len(list) > 0 {
			if err := wait(ahead / 2); err != nil {
				return err
			}
			n := min(len(list), ahead/2)
			if err := r.queue.publish(ctx, of, r.id, list[:n]); err != nil {
				return err
			}
			given, list = given+n, list[n:]
		}
		return nil
	})
	if err == nil {
		err = wait(0)
	}
	if err != nil {
		back := r.takeBack(ctx)
		return done, nil, errors.Join(err, back)
	}
	failed, err = r.store.RescoreFailures(ctx, r.id)
	return done, failed, err
}

// takeBack removes what still waits, also if ctx has ended.
func (r *Run) takeBack(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return r.queue.purge(ctx, r.options.Query.Series, r.id)
}

// watch notices that no worker serves the ensemble any more.
type watch struct {
	run          *Run
	looked, seen time.Time
}

func (w *watch) look(ctx context.Context) error {
	if time.Since(w.looked) < lookEvery {
		return ctx.Err()
	}
	w.looked = time.Now()
	err := Served(ctx, w.run.store, w.run.options.Query.Series)
	if err == nil {
		w.seen = w.looked
	}
	if errors.Is(err, ErrNotServed) && time.Since(w.seen) < aloneMost { // workers may be restarting
		return ctx.Err()
	}
	return err
}

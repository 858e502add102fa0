package app

import (
	"context"
	"fmt"
	"time"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// Recorder is the store as the monitor needs it.
type Recorder struct{ *postgres.Store }

// Recorded reports whether the event has its verdict. It refuses events that are older than retention keeps scores.
func (r Recorder) Recorded(ctx context.Context, ev schema.Event, d schema.Delivery) (bool, error) {
	known, err := r.Known(ctx, ev.Identity(), d)
	if err == nil && !known {
		err = r.CheckAge(ev.Time, d.Time)
	}
	return known, unavailable(err)
}

// Record commits a verdict and reports whether it is the first, and which of its alerts are not sent.
func (r Recorder) Record(ctx context.Context, v schema.Verdict) (monitor.Recorded, error) {
	recorded, err := r.Store.Record(ctx, v)
	return monitor.Recorded{First: recorded.First, Withheld: recorded.Withheld}, unavailable(err)
}

// tries is the store as the consumers need it.
type tries struct{ *postgres.Store }

func (t tries) Try(ctx context.Context, d schema.Delivery, add schema.Tries) (schema.Tries, error) {
	sum, err := t.Store.Try(ctx, d, add)
	return sum, unavailable(err)
}

// rescores is the store as the worker of re-scores needs it.
type rescores struct{ *postgres.Store }

func (r rescores) RescoreSource(ctx context.Context, e postgres.StoredEvent, of schema.Series,
) (*schema.Score, bool, error) {
	score, done, err := r.Store.RescoreSource(ctx, e, of)
	return score, done, unavailable(err)
}

func (r rescores) RecordRescore(ctx context.Context, score schema.Rescore) (first bool, err error) {
	first, err = r.Store.RecordRescore(ctx, score)
	return first, unavailable(err)
}

// unavailable marks an error that is not about the verdict: the message is kept until the database works again.
func unavailable(err error) error {
	if err == nil || postgres.Refused(err) {
		return err
	}
	return consumers.Unavailable(err)
}

// recent is how long a good run proves that a session works.
const recent = 10 * time.Second

// healthy reports whether verdicts can be committed and requests scored. It is asked only after a failure.
func healthy(store *postgres.Store, engines map[string]*scoring.Engine) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := store.Ping(ctx); err != nil {
			return fmt.Errorf("postgres: %w", err)
		}
		for name, engine := range engines {
			if err := engine.Check(ctx, recent); err != nil {
				return fmt.Errorf("ensemble %s: %w", name, err)
			}
		}
		return nil
	}
}

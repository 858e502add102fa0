package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// rescoreRow is a row of rescores: a row of scores, and why it was made.
type rescoreRow struct {
	scoreRow
	purpose schema.Purpose
}

// columns returns the columns that are not fields.
func (r rescoreRow) columns() []string { return append(r.scoreRow.columns(), "purpose") }

// MarshalJSON writes the row.
func (r rescoreRow) MarshalJSON() ([]byte, error) {
	row, err := json.Marshal(r.scoreRow)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(row[:len(row)-1], `,"purpose":%q}`, r.purpose), nil
}

// RecordRescore stores a score beside the event's verdict, with its alerts, in one transaction. It returns false, and
// stores nothing, if the event has a score of this ensemble and these settings beside its verdict already. The errors
// are those of [Store.Record].
func (s *Store) RecordRescore(ctx context.Context, r schema.Rescore) (first bool, err error) {
	if err := checkScore(r.Score); err != nil {
		return false, fmt.Errorf("record re-score: %w", err)
	}
	c := &call{}
	for _, a := range r.Alerts {
		if err := c.addAlert(a, s.config.Sinks); err != nil {
			return false, fmt.Errorf("record re-score: %w", err)
		}
	}
	if err := s.ensureMonth(ctx, r.Score.Event.Time); err != nil {
		return false, fmt.Errorf("record re-score: %w", err)
	}
	row, err := json.Marshal([]rescoreRow{{newScoreRow(r.Score), r.Purpose}})
	if err != nil {
		return false, fmt.Errorf("record re-score: %w", err)
	}
	err = s.begin(ctx, "record re-score", func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, insertStatement[rescoreRow]("rescores")+" ON CONFLICT DO NOTHING", row)
		first = err == nil && tag.RowsAffected() > 0
		if !first || len(r.Alerts) == 0 {
			return err
		}
		alerts := make([]*alertRow, len(c.alerts))
		for i := range c.alerts {
			alerts[i] = &c.alerts[i]
		}
		outbox, err := withhold(ctx, tx, s.config.Volume, alerts, c.outbox)
		if err != nil {
			return err
		}
		b := &batch{}
		insertAlerts(b, alerts, outbox, []reviewRow{newReviewRow(r.Score, r.Alerts)})
		return b.send(ctx, tx)
	})
	return first && err == nil, err
}

// StoredEvent names an event that has a live score.
type StoredEvent struct {
	Time       time.Time
	Source, ID string
}

// RescoreQuery selects the events of a model that a re-score takes: those with a live score by another ensemble or
// other settings, and none by these.
type RescoreQuery struct {
	Series       schema.Series // that the events get a score of
	Since, Until time.Time     // event times in [Since, Until)
	Classes      []int         // nil means all
}

// RescoreCandidates returns at most limit of the events that a query selects and that come after an event, in order of
// time. Events of canaries are left out.
func (s *Store) RescoreCandidates(ctx context.Context, q RescoreQuery, after StoredEvent, limit int,
) ([]StoredEvent, error) {
	events, err := list(ctx, s.pool, pgx.RowToStructByPos[StoredEvent], rescoreCandidates,
		q.Series.Model, q.Series.EnsembleDigest, q.Series.Settings, q.Since, q.Until, q.Classes,
		after.Time, after.Source, after.ID, limit)
	if err != nil {
		return nil, fmt.Errorf("read events to score again: %w", err)
	}
	return events, nil
}

// RescoreSource returns the live score of an event, from which it can be scored again, and whether the event has a
// score of the series already. The error is ErrNotFound if retention dropped the live score.
func (s *Store) RescoreSource(ctx context.Context, e StoredEvent, of schema.Series) (*schema.Score, bool, error) {
	var row scoreRow
	var known bool
	err := s.pool.QueryRow(ctx, rescoreSource, e.Time, e.Source, e.ID, of.Model, of.EnsembleDigest, of.Settings).
		Scan(&row, &known)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, false, fmt.Errorf("live score of event %s: %w", e.ID, ErrNotFound)
	}
	if err != nil {
		return nil, false, fmt.Errorf("read the live score of event %s: %w", e.ID, err)
	}
	return row.score(), known, nil
}

// RescoreFailure is an event that could not be scored again.
type RescoreFailure struct {
	Run    string
	Event  StoredEvent
	Series schema.Series
	Kind   string // unknown_class, non_finite, gone, failed
	Reason string
}

// FailRescore records why an event could not be scored again.
func (s *Store) FailRescore(ctx context.Context, f RescoreFailure) error {
	_, err := s.pool.Exec(ctx, insertRescoreFailure, f.Run, f.Event.Source, f.Event.ID, f.Event.Time, f.Series.Model,
		f.Series.EnsembleDigest, f.Kind, clean(f.Reason))
	if err != nil {
		return fmt.Errorf("record that event %s was not scored again: %w", f.Event.ID, err)
	}
	return nil
}

// RescoreFailures counts what a run could not score.
type RescoreFailures struct {
	Kind   string
	Events int
	Reason string // of one of them
}

// RescoreFailures returns the failures of a run by their kind, the most frequent first.
func (s *Store) RescoreFailures(ctx context.Context, run string) ([]RescoreFailures, error) {
	counts, err := list(ctx, s.pool, pgx.RowToStructByPos[RescoreFailures], rescoreFailures, run)
	if err != nil {
		return nil, fmt.Errorf("count failures of run %s: %w", run, err)
	}
	return counts, nil
}

// RescoreCost returns the mean rows of the newest scores of a series, and the rows per second at which the workers
// scored the model in their busiest minute of the last day. Both are 0 if nothing is known.
func (s *Store) RescoreCost(ctx context.Context, of schema.Series) (rows, perSecond float64, err error) {
	err = s.pool.QueryRow(ctx, rescoreCost, of.Model, of.EnsembleDigest, of.Settings).Scan(&rows)
	if err == nil {
		err = s.pool.QueryRow(ctx, rescoreRate, of.Model).Scan(&perSecond)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read what scores cost: %w", err)
	}
	return rows, perSecond, nil
}

// FeedShadow gives a shadow ensemble the events that got a live score of another ensemble since it was last called, at
// most limit of them. If give fails, the events are given again. It returns how far the shadow is behind, and whether
// more events wait. The first call for a shadow notes where it begins. Of several callers at a time, one works.
func (s *Store) FeedShadow(ctx context.Context, model, digest string, limit int, give func([]StoredEvent) error,
) (behind time.Duration, more bool, err error) {
	if _, err := s.pool.Exec(ctx, beginShadow, model, digest); err != nil {
		return 0, false, fmt.Errorf("begin shadow of %s: %w", model, err)
	}
	err = s.begin(ctx, "feed the shadow of "+model, func(tx pgx.Tx) error {
		var from, until time.Time
		// A verdict is visible when its transaction has committed, which is later than its time.
		err := tx.QueryRow(ctx, lockShadow, model, digest, s.config.CommitTimeout+time.Second).Scan(&from, &until)
		if errors.Is(err, pgx.ErrNoRows) { // another worker feeds it
			return nil
		}
		if err != nil || !until.After(from) {
			return err
		}
		var events []StoredEvent
		var last time.Time
		rows, err := tx.Query(ctx, shadowCandidates, model, digest, from, until, limit)
		if err != nil {
			return err
		}
		var e StoredEvent
		_, err = pgx.ForEachRow(rows, []any{&e.Time, &e.Source, &e.ID, &last}, func() error {
			events = append(events, e)
			return nil
		})
		if err != nil {
			return err
		}
		if more = len(events) == limit; more {
			until = last.Add(time.Microsecond)
		}
		if len(events) > 0 {
			if err := give(events); err != nil {
				return err
			}
		}
		behind = time.Since(until)
		_, err = tx.Exec(ctx, advanceShadow, model, digest, until)
		return err
	})
	return behind, more, err
}

// Serving returns the workers that score a model and were seen within the time.
func (s *Store) Serving(ctx context.Context, model string, within time.Duration) ([]Worker, error) {
	workers, err := list(ctx, s.pool, pgx.RowToStructByPos[Worker], servingWorkers, model, within)
	if err != nil {
		return nil, fmt.Errorf("read the workers of %s: %w", model, err)
	}
	return workers, nil
}

// Serves reports whether the worker scores with an ensemble, live or as a shadow.
func (w WorkerModel) Serves(digest string) bool {
	return w.EnsembleDigest == digest || slices.Contains(w.Shadows, digest)
}

// SeriesOf returns the series of the scores and thresholds whose ensemble's digest begins with a prefix.
func (s *Store) SeriesOf(ctx context.Context, digestPrefix string) ([]schema.Series, error) {
	known, err := list(ctx, s.pool, pgx.RowToStructByPos[schema.Series], seriesKnown, digestPrefix)
	if err != nil {
		return nil, fmt.Errorf("read series: %w", err)
	}
	return known, nil
}

// ScoredBy calls f with the two scores of each event that both series scored with event times in [since, until), in
// order of time, canaries left out. They hold the event's identity and time, its class, and of each measurement the
// value, the mean distance and whether it is saturated.
func (s *Store) ScoredBy(ctx context.Context, one, other schema.Series, since, until time.Time,
	f func(one, other *schema.Score) error,
) error {
	rows, err := s.pool.Query(ctx, seriesPairs, one.Model, one.EnsembleDigest, one.Settings, other.EnsembleDigest,
		other.Settings, since, until)
	if err != nil {
		return fmt.Errorf("read scores of two ensembles: %w", err)
	}
	var of StoredEvent
	var pair [2]*schema.Score // of one event
	flush := func() error {
		if pair[0] == nil || pair[1] == nil {
			return nil
		}
		return f(pair[0], pair[1])
	}
	var e StoredEvent
	var class int
	var label string
	var first bool
	var m schema.NamedMeasurement
	_, err = pgx.ForEachRow(rows, []any{&e.Time, &e.Source, &e.ID, &class, &label, &first, &m.Name, &m.Value,
		&m.MeanDistance, &m.Saturated}, func() error {
		if e != of {
			if err := flush(); err != nil {
				return err
			}
			of, pair = e, [2]*schema.Score{}
		}
		i, series := 1, other
		if first {
			i, series = 0, one
		}
		if pair[i] == nil {
			pair[i] = &schema.Score{
				Event: schema.Event{Source: e.Source, ID: e.ID, Time: e.Time.UTC(),
					Data: schema.Generation{Model: series.Model}},
				ClassIndex: class, ClassLabel: label,
				Receipt: schema.Receipt{EnsembleDigest: series.EnsembleDigest, Settings: series.Settings},
			}
		}
		pair[i].SetMeasurement(m.Name, m.Measurement)
		return nil
	})
	if err == nil {
		err = flush()
	}
	if err != nil {
		return fmt.Errorf("read scores of two ensembles: %w", err)
	}
	return nil
}

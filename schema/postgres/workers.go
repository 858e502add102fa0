package postgres

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// WorkerModel is a model that a worker scores, and with what.
type WorkerModel struct {
	Model          string
	EnsembleDigest string
	Settings       string   // of its fixed profile
	Shadows        []string // digests of the ensembles that it serves as shadows
}

// Worker is another process that scores a model.
type Worker struct {
	WorkerModel
	Host      string
	StartedAt time.Time
	Older     bool // it started before the worker that asked
}

// written are the tables that a verdict writes.
var written = []string{
	"events", "scores", "skips", "dead_letters", "alerts", "outbox", "reviews", "evidence_jobs", "class_hour_parts",
	"class_day_parts", "outcome_hour_parts", "repeats", "tries",
}

// Beat commits a row for each model of the worker with the given id, and returns the other workers that score one of
// the models with another ensemble or other settings and were seen within the time. Two ensembles of which one is
// served as a shadow of the other are no such case. The error says what keeps verdicts
// from being written: the write failed, or the rights to a table that verdicts are written to are missing.
func (s *Store) Beat(ctx context.Context, id, host string, models []WorkerModel,
	within time.Duration) (others []Worker, up time.Duration, err error) {
	var names, digests, settings, shadows []string
	for _, m := range models {
		names, digests, settings = append(names, m.Model), append(digests, m.EnsembleDigest), append(settings, m.Settings)
		shadows = append(shadows, strings.Join(m.Shadows, ","))
	}
	err = s.begin(ctx, "write the worker's heartbeat", func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, beatWorker, id, clean(host), names, digests, settings, shadows)
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `SELECT decuwatch.forget_workers()`); err != nil {
			return err
		}
		var missing []string
		err = tx.QueryRow(ctx, tablesNotWritable, written).Scan(&missing)
		if err == nil && len(missing) > 0 {
			err = fmt.Errorf("no such table, or no right to insert: %s", strings.Join(missing, ", "))
		}
		if err != nil {
			return err
		}
		var seconds float64
		if err := tx.QueryRow(ctx, workerUptime, id).Scan(&seconds); err != nil {
			return err
		}
		up = time.Duration(seconds * float64(time.Second))
		others, err = list(ctx, tx, pgx.RowToStructByPos[Worker], otherWorkers, id, within)
		return err
	})
	return others, up, err
}

// Leave hides what Beat wrote from other workers, so that they do not take a stopped worker for a running one.
func (s *Store) Leave(ctx context.Context, id string) error {
	_, err := s.pool.Exec(ctx, leaveWorker, id)
	if err != nil {
		return fmt.Errorf("take the worker's heartbeat back: %w", err)
	}
	return nil
}

// Now returns the time by the database's clock.
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	var now time.Time
	if err := s.pool.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&now); err != nil {
		return now, fmt.Errorf("read the database's clock: %w", err)
	}
	return now, nil
}

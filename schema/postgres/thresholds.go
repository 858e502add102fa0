package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// Kinds of a change of thresholds.
const (
	ChangeManual      = "manual"
	ChangeCalibration = "calibration"
	ChangeReference   = "reference"
	ChangeRollback    = "rollback"
)

// ThresholdChange is who changed thresholds, when and why.
type ThresholdChange struct {
	ID         int64              `json:"id"`
	Kind       string             `json:"kind"`
	Undoes     int64              `json:"undoes,omitempty"` // the change that a rollback took back; 0 otherwise
	SetBy      string             `json:"set_by"`
	Reason     string             `json:"reason"`
	SetAt      time.Time          `json:"set_at"`
	Thresholds []schema.Threshold `json:"thresholds"` // as set by the change
}

// thresholdRow is a row of thresholds.
type thresholdRow struct {
	ID             int64                  `json:"id,omitempty"`
	ChangeID       int64                  `json:"change_id"`
	Model          string                 `json:"model"`
	EnsembleDigest string                 `json:"ensemble_digest"`
	Settings       string                 `json:"settings"`
	Measurement    schema.MeasurementName `json:"measurement"`
	Scope          schema.Scope           `json:"scope"`
	ClassIndex     *int                   `json:"class_index"`
	Severity       schema.Severity        `json:"severity"`
	Value          float64                `json:"value"`
	Distance       *float64               `json:"distance"`
	Withdrawn      bool                   `json:"withdrawn"`
	Origin         string                 `json:"origin"`
	N              int                    `json:"n"`
	Alpha          *float64               `json:"alpha"`
	Achieved       *float64               `json:"achieved"`
	WindowFrom     *time.Time             `json:"window_from"`
	WindowTo       *time.Time             `json:"window_to"`
	SetBy          string                 `json:"set_by"`
	Reason         string                 `json:"reason"`
	SetAt          time.Time              `json:"set_at"`
}

func (r thresholdRow) threshold() schema.Threshold {
	return schema.Threshold{
		ID: r.ID, Model: r.Model, EnsembleDigest: r.EnsembleDigest, Settings: r.Settings, Measurement: r.Measurement,
		Scope: r.Scope, Class: r.ClassIndex,
		Severity: r.Severity, Value: r.Value, Distance: r.Distance, Withdrawn: r.Withdrawn, Origin: r.Origin, N: r.N,
		Alpha:    r.Alpha,
		Achieved: r.Achieved, WindowFrom: r.WindowFrom, WindowTo: r.WindowTo, SetBy: r.SetBy, Reason: r.Reason,
		SetAt: r.SetAt.UTC(),
	}
}

// Thresholds returns the thresholds in force, in order of their id.
func (s *Store) Thresholds(ctx context.Context) ([]schema.Threshold, error) {
	return thresholdsInForce(ctx, s.pool)
}

// querier is a connection, a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func thresholdsInForce(ctx context.Context, q querier) ([]schema.Threshold, error) {
	rows, err := q.Query(ctx, inForce)
	if err != nil {
		return nil, fmt.Errorf("read thresholds: %w", err)
	}
	return collectThresholds(rows)
}

func collectThresholds(rows pgx.Rows) ([]schema.Threshold, error) {
	found, err := pgx.CollectRows(rows, pgx.RowTo[thresholdRow])
	if err != nil {
		return nil, fmt.Errorf("read thresholds: %w", err)
	}
	thresholds := make([]schema.Threshold, len(found))
	for i, row := range found {
		thresholds[i] = row.threshold()
	}
	return thresholds, nil
}

// SetThreshold sets one threshold by hand and returns it as stored. It replaces the one of the same key.
func (s *Store) SetThreshold(ctx context.Context, t schema.Threshold) (schema.Threshold, error) {
	kind := ChangeManual
	if t.Origin == "reference" {
		kind = ChangeReference
	}
	c, err := s.SetThresholds(ctx, ThresholdChange{Kind: kind, SetBy: t.SetBy, Reason: t.Reason,
		Thresholds: []schema.Threshold{t}})
	if err != nil {
		return schema.Threshold{}, err
	}
	return c.Thresholds[0], nil
}

// SetThresholds sets thresholds that take effect together and returns the change as stored, its thresholds in their
// order. Each replaces the one of the same key; one that is Withdrawn takes its key out of force. The monitors are
// told by NOTIFY at the commit. The error wraps [schema.ErrContradiction] if a scope's critical threshold would stand
// below its warn threshold; nothing is changed then.
func (s *Store) SetThresholds(ctx context.Context, c ThresholdChange) (ThresholdChange, error) {
	if len(c.Thresholds) == 0 {
		return c, errors.New("set thresholds: no threshold is given")
	}
	for _, t := range c.Thresholds {
		if !finite(t.Value) || t.Distance != nil && !finite(*t.Distance) {
			return c, fmt.Errorf("set thresholds: %w", ErrNotFinite)
		}
	}
	err := s.begin(ctx, "set thresholds", func(tx pgx.Tx) (err error) {
		c, err = insertChange(ctx, tx, c)
		return err
	})
	return c, err
}

// lockThresholds lets one change in at a time, so that a rollback sees what it takes back and a change sees what it may
// contradict.
func lockThresholds(ctx context.Context, tx pgx.Tx) error {
	_, err := tx.Exec(ctx, `SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('decuwatch.thresholds'))`)
	return err
}

func insertChange(ctx context.Context, tx pgx.Tx, c ThresholdChange) (ThresholdChange, error) {
	if err := lockThresholds(ctx, tx); err != nil {
		return c, err
	}
	inForce, err := thresholdsInForce(ctx, tx)
	if err != nil {
		return c, err
	}
	if err := schema.CheckChange(inForce, c.Thresholds); err != nil {
		return c, err
	}
	err = tx.QueryRow(ctx, insertThresholdChange,
		c.Kind, c.Undoes, c.SetBy, clean(c.Reason)).Scan(&c.ID, &c.SetAt)
	if err != nil {
		return c, err
	}
	set := make([]schema.Threshold, len(c.Thresholds))
	for i, t := range c.Thresholds {
		row := thresholdRow{
			ChangeID: c.ID, Model: t.Model, EnsembleDigest: t.EnsembleDigest, Settings: t.Settings, Measurement: t.Measurement,
			Scope:      t.Scope,
			ClassIndex: t.Class, Severity: t.Severity, Value: t.Value, Distance: t.Distance, Withdrawn: t.Withdrawn,
			Origin: t.Origin, N: t.N,
			Alpha: t.Alpha, Achieved: t.Achieved, WindowFrom: t.WindowFrom, WindowTo: t.WindowTo, SetBy: c.SetBy,
			Reason: clean(c.Reason), SetAt: c.SetAt,
		}
		set[i] = row.threshold()
		err := tx.QueryRow(ctx, insertStatement[thresholdRow]("thresholds")+" RETURNING id",
			[]thresholdRow{row}).Scan(&set[i].ID)
		if err != nil {
			return c, fmt.Errorf("%s threshold of scope %s for model %s: %w", t.Measurement, t.Scope, t.Model, err)
		}
	}
	c.Thresholds = set
	return c, nil
}

// RollbackThresholds takes the newest change that still stands back, by setting what was in force before it; nothing
// is deleted. Calling it again takes the change before that back. The error is ErrNotFound if there is none, and wraps
// [schema.ErrContradiction] if what was in force contradicts itself, as versions without that check allowed.
func (s *Store) RollbackThresholds(ctx context.Context, by, reason string) (ThresholdChange, error) {
	var c ThresholdChange
	err := s.begin(ctx, "roll back thresholds", func(tx pgx.Tx) error {
		if err := lockThresholds(ctx, tx); err != nil {
			return err
		}
		var undone int64
		err := tx.QueryRow(ctx, lastThresholdChange).Scan(&undone)
		if errors.Is(err, pgx.ErrNoRows) {
			return fmt.Errorf("a change to take back: %w", ErrNotFound)
		}
		if err != nil {
			return err
		}
		// For each key of the change: the newest row before it, or a withdrawal if there was none.
		rows, err := tx.Query(ctx, thresholdsBeforeChange, undone)
		if err != nil {
			return err
		}
		before, err := collectThresholds(rows)
		if err != nil {
			return err
		}
		c, err = insertChange(ctx, tx, ThresholdChange{Kind: ChangeRollback, Undoes: undone, SetBy: by, Reason: reason,
			Thresholds: before})
		return err
	})
	return c, err
}

// ThresholdHistory returns the newest changes of a model's thresholds (of all models if model is empty) with the
// thresholds that they set, the newest first, at most limit.
func (s *Store) ThresholdHistory(ctx context.Context, model string, limit int) ([]ThresholdChange, error) {
	rows, err := s.pool.Query(ctx, thresholdChanges, model, limit)
	if err != nil {
		return nil, fmt.Errorf("read history of thresholds: %w", err)
	}
	changes, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (c ThresholdChange, err error) {
		err = row.Scan(&c.ID, &c.Kind, &c.Undoes, &c.SetBy, &c.Reason, &c.SetAt)
		return c, err
	})
	if err != nil {
		return nil, fmt.Errorf("read history of thresholds: %w", err)
	}
	for i := range changes {
		rows, err := s.pool.Query(ctx, thresholdsOfChange, changes[i].ID)
		if err != nil {
			return nil, fmt.Errorf("read history of thresholds: %w", err)
		}
		if changes[i].Thresholds, err = collectThresholds(rows); err != nil {
			return nil, err
		}
	}
	return changes, nil
}

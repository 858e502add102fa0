package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
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

// Thresholds returns the thresholds in force, in order of their id.
func (s *Store) Thresholds(ctx context.Context) ([]schema.Threshold, error) {
	return thresholdsInForce(ctx, s.pool)
}

// querier is a connection, a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func thresholdsInForce(ctx context.Context, q querier) ([]schema.Threshold, error) {
	return collectThresholds(q.Query(ctx, inForce))
}

// collectThresholds reads thresholds, one as JSON in each row.
func collectThresholds(rows pgx.Rows, err error) ([]schema.Threshold, error) {
	thresholds, err := collect[schema.Threshold](rows, err)
	if err != nil {
		return nil, fmt.Errorf("read thresholds: %w", err)
	}
	for i := range thresholds {
		thresholds[i].SetAt = thresholds[i].SetAt.UTC()
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
	c.Thresholds = slices.Clone(c.Thresholds)
	for i := range c.Thresholds {
		t := &c.Thresholds[i]
		t.SetBy, t.Reason, t.SetAt = c.SetBy, clean(c.Reason), c.SetAt.UTC()
		err := tx.QueryRow(ctx, insertThreshold, c.ID, t.Model, t.EnsembleDigest, t.Settings, t.Measurement, t.Scope, t.Class,
			t.Severity, t.Value, t.Distance, t.Withdrawn, t.Origin, t.N, t.Alpha, t.Achieved, t.WindowFrom, t.WindowTo,
			t.SetBy, t.Reason, t.SetAt).Scan(&t.ID)
		if err != nil {
			return c, fmt.Errorf("%s threshold of scope %s for model %s: %w", t.Measurement, t.Scope, t.Model, err)
		}
	}
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
		before, err := collectThresholds(tx.Query(ctx, thresholdsBeforeChange, undone))
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
		changes[i].Thresholds, err = collectThresholds(s.pool.Query(ctx, thresholdsOfChange, changes[i].ID))
		if err != nil {
			return nil, err
		}
	}
	return changes, nil
}

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
	Thresholds []schema.Threshold `json:"thresholds" db:"-"` // as set by the change
}

// Thresholds returns the thresholds in force, in order of their id.
func (s *Store) Thresholds(ctx context.Context) ([]schema.Threshold, error) {
	return listThresholds(ctx, s.pool, inForce)
}

// listThresholds returns the thresholds that a query selects, each as JSON.
func listThresholds(ctx context.Context, q querier, sql string, args ...any) ([]schema.Threshold, error) {
	thresholds, err := list(ctx, q, pgx.RowTo[schema.Threshold], sql, args...)
	if err != nil {
		return nil, fmt.Errorf("read thresholds: %w", err)
	}
	for i := range thresholds {
		thresholds[i].SetAt = thresholds[i].SetAt.UTC()
	}
	return thresholds, nil
}

// SetThreshold sets one threshold by hand and returns it as stored. It replaces the threshold of the same key.
func (s *Store) SetThreshold(ctx context.Context, t schema.Threshold) (schema.Threshold, error) {
	kind := ChangeManual
	if t.Origin == "reference" {
		kind = ChangeReference
	}
	c, err := s.SetThresholds(ctx, ThresholdChange{
		Kind: kind, SetBy: t.SetBy, Reason: t.Reason, Thresholds: []schema.Threshold{t},
	})
	if err != nil {
		return schema.Threshold{}, err
	}
	return c.Thresholds[0], nil
}

// SetThresholds sets thresholds that take effect together and returns the change as stored, its thresholds in their
// order. Each replaces the threshold of the same key; a Withdrawn threshold takes its key out of force. The commit
// notifies ChannelThresholds. The error wraps [schema.ErrContradiction] if a scope's critical threshold would be below
// its warn threshold; nothing is changed then.
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
	current, err := listThresholds(ctx, tx, inForce)
	if err != nil {
		return c, err
	}
	if err := schema.CheckChange(current, c.Thresholds); err != nil {
		return c, err
	}
	err = tx.QueryRow(ctx, insertThresholdChange, c.Kind, c.Undoes, c.SetBy, clean(c.Reason)).Scan(&c.ID, &c.SetAt)
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

// RollbackThresholds undoes the newest change that was not undone yet, by setting what was in force before it. Nothing
// is deleted. Calling it again undoes the change before that. The error is ErrNotFound if there is nothing to undo, and
// wraps [schema.ErrContradiction] if what was in force contradicts itself, which older versions allowed.
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
		before, err := listThresholds(ctx, tx, thresholdsBeforeChange, undone)
		if err != nil {
			return err
		}
		c, err = insertChange(ctx, tx, ThresholdChange{
			Kind: ChangeRollback, Undoes: undone, SetBy: by, Reason: reason, Thresholds: before,
		})
		return err
	})
	return c, err
}

// NewestChange returns the newest change that set or withdrew a threshold of a model's measurement, or 0 if the model
// never had one. Absolute limits are left out.
func (s *Store) NewestChange(ctx context.Context, model string, of schema.MeasurementName) (id int64, err error) {
	if err := s.pool.QueryRow(ctx, newestThresholdChange, model, of).Scan(&id); err != nil {
		return 0, fmt.Errorf("read changes of thresholds: %w", err)
	}
	return id, nil
}

// ThresholdHistory returns the newest changes of a model's thresholds (of all models if model is empty) with the
// thresholds that they set, the newest first, at most limit.
func (s *Store) ThresholdHistory(ctx context.Context, model string, limit int) ([]ThresholdChange, error) {
	changes, err := list(ctx, s.pool, pgx.RowToStructByPos[ThresholdChange], thresholdChanges, model, limit)
	if err != nil {
		return nil, fmt.Errorf("read history of thresholds: %w", err)
	}
	for i := range changes {
		changes[i].Thresholds, err = listThresholds(ctx, s.pool, thresholdsOfChange, changes[i].ID)
		if err != nil {
			return nil, err
		}
	}
	return changes, nil
}

package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// DeadLetter is a dead letter as people read it.
type DeadLetter struct {
	ID           int64                 `json:"id"`
	RecordedAt   time.Time             `json:"recorded_at"`
	Kind         schema.DeadLetterKind `json:"kind"`
	Field        string                `json:"field"`
	Reason       string                `json:"reason"`
	Model        string                `json:"model"`
	Source       string                `json:"source"` // as far as it could be read, like the next two
	EventID      string                `json:"event_id"`
	EventTime    *time.Time            `json:"event_time"`
	Subject      string                `json:"subject"`
	Stream       string                `json:"stream"`
	Sequence     int64                 `json:"sequence"`
	Delivered    int                   `json:"delivered"`
	PayloadState string                `json:"payload_state"`  // whole, cut or expired
	PayloadBytes int                   `json:"payload_bytes"`  // as it came
	Payload      []byte                `json:"-"`              // of DeadLetterByID only
	Republished  *int64                `json:"republished_as"` // sequence; nil if it was not published again
	Outcome      schema.Outcome        `json:"outcome"`        // the verdict that stands now; "" if there is none
	OutcomeWhy   string                `json:"outcome_reason"`
}

// DeadLetterFilter selects dead letters. Empty fields select everything.
type DeadLetterFilter struct {
	Model, Source string
	Kinds         []schema.DeadLetterKind
}

// DeadLetters returns dead letters without their payload, newest first.
func (s *Store) DeadLetters(ctx context.Context, f DeadLetterFilter, limit int) ([]DeadLetter, error) {
	found, err := list(ctx, s.pool, pgx.RowToStructByPos[DeadLetter], deadLettersList, int64(0), f.Model, f.Source,
		notNil(f.Kinds), limit)
	if err != nil {
		return nil, fmt.Errorf("read dead letters: %w", err)
	}
	return found, nil
}

// DeadLetterByID returns a dead letter with what is kept of its payload. The error is ErrNotFound if it does not exist.
func (s *Store) DeadLetterByID(ctx context.Context, id int64) (DeadLetter, error) {
	found, err := list(ctx, s.pool, pgx.RowToStructByPos[DeadLetter], deadLettersList, id, "", "",
		[]schema.DeadLetterKind{}, 1)
	if err == nil && len(found) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return DeadLetter{}, fmt.Errorf("dead letter %d: %w", id, err)
	}
	return found[0], nil
}

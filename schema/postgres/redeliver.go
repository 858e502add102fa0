package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// StoredDeadLetter is a dead letter with its message.
type StoredDeadLetter struct {
	ID           int64
	RecordedAt   time.Time
	Stream       string
	Sequence     uint64
	Digest       string
	Source       string // "" if the message is not an event
	EventID      string
	Model        string
	Subject      string
	Kind         schema.DeadLetterKind
	Reason       string
	Payload      []byte
	PayloadState string // whole, cut or expired
}

// DeadLetterQuery selects dead letters of a stream that were not redelivered. Empty fields select everything.
type DeadLetterQuery struct {
	Stream   string
	Model    string
	Kinds    []schema.DeadLetterKind
	From, To uint64 // sequence numbers
	IDs      []int64
}

const deadLetterPage = 200 // of at most 64 KiB each

// EachDeadLetter calls f with each dead letter that the query selects, oldest first, page by page.
func (s *Store) EachDeadLetter(ctx context.Context, q DeadLetterQuery, f func(StoredDeadLetter) error) error {
	for after := int64(0); ; {
		page, err := s.deadLetters(ctx, q, after)
		if err != nil {
			return fmt.Errorf("read dead letters: %w", err)
		}
		for _, l := range page {
			if err := f(l); err != nil {
				return err
			}
			after = l.ID
		}
		if len(page) < deadLetterPage {
			return nil
		}
	}
}

func (s *Store) deadLetters(ctx context.Context, q DeadLetterQuery, after int64) ([]StoredDeadLetter, error) {
	return list(ctx, s.pool, pgx.RowToStructByPos[StoredDeadLetter], deadLettersToRedeliver, after, q.Stream, q.Model,
		notNil(q.Kinds), int64(q.From), int64(q.To), notNil(q.IDs), deadLetterPage)
}

// Redeliver opens the event of a dead letter for a new verdict and returns the number of the redelivery. Asked again,
// it returns the same number and changes nothing. The error says so if a message of the dead letter's kind would fail
// again.
func (s *Store) Redeliver(ctx context.Context, deadLetter int64, by string) (int64, error) {
	var id int64
	if err := s.pool.QueryRow(ctx, `SELECT decuwatch.redeliver($1, $2)`, deadLetter, by).Scan(&id); err != nil {
		return 0, fmt.Errorf("open dead letter %d: %w", deadLetter, err)
	}
	return id, nil
}

// Redelivered notes under which sequence number the message of a redelivery was published.
func (s *Store) Redelivered(ctx context.Context, id int64, sequence uint64) error {
	if _, err := s.pool.Exec(ctx, redelivered, id, int64(sequence)); err != nil {
		return fmt.Errorf("note redelivery %d: %w", id, err)
	}
	return nil
}

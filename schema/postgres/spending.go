package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Bucket is how many rows the budget of a model holds in an hour and in a day, 0 being no bound; or how many of them
// are missing.
type Bucket struct{ Hour, Day float64 }

// Spending is what became of a request for rows.
type Spending struct {
	Granted float64
	Missing Bucket  // from the full bucket, with what was granted
	Share   float64 // in force for the model, see ChangeShare
}

// SpendRows takes rows from the bucket of a model, which the workers share: at least least, else nothing, and at most
// most. An event that costs more than a whole bucket takes a full one.
func (s *Store) SpendRows(ctx context.Context, model string, size Bucket, least, most float64) (Spending, error) {
	return s.spend(ctx, model, size, least, most, false)
}

// BookRows takes rows that were spent already, whatever the bucket holds. Negative rows are given back.
func (s *Store) BookRows(ctx context.Context, model string, size Bucket, rows float64) (Spending, error) {
	return s.spend(ctx, model, size, rows, rows, true)
}

func (s *Store) spend(
	ctx context.Context, model string, size Bucket, least, most float64, booked bool,
) (p Spending, err error) {
	take := func() error {
		return s.pool.QueryRow(ctx, spendRows, model, size.Hour, size.Day, least, most, booked).
			Scan(&p.Granted, &p.Missing.Hour, &p.Missing.Day, &p.Share)
	}
	err = take()
	if errors.Is(err, pgx.ErrNoRows) {
		if _, err = s.pool.Exec(ctx, beginBudget, model); err == nil {
			err = take()
		}
	}
	if err != nil {
		return Spending{}, fmt.Errorf("take rows of model %s: %w", model, err)
	}
	return p, nil
}

// ChangeShare changes the share of a model's events that is scored beside what the sampling rules say, unless another
// worker has changed it since.
func (s *Store) ChangeShare(ctx context.Context, model string, from, to float64, reason string) error {
	if _, err := s.pool.Exec(ctx, changeShare, model, from, to, reason); err != nil {
		return fmt.Errorf("change the share of model %s: %w", model, err)
	}
	return nil
}

// LeastShare returns the least share that was in force for a model since a moment.
func (s *Store) LeastShare(ctx context.Context, model string, since time.Time) (share float64, err error) {
	if err := s.pool.QueryRow(ctx, leastShare, model, since).Scan(&share); err != nil {
		return 0, fmt.Errorf("read the shares of model %s: %w", model, err)
	}
	return share, nil
}

package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// Sent returns the ids of the messages that the stream of alerts should hold: alerts that were recorded within a time
// and that the outbox does not owe, and whatever else it delivered in that time. A time of 0 is no bound. Age is
// measured on the server's clock.
func (s *Store) Sent(ctx context.Context, within time.Duration) ([]string, error) {
	ids, err := list(ctx, s.pool, pgx.RowTo[string], messagesSent, schema.DispatchOwed, schema.SinkStream, within)
	if err != nil {
		return nil, fmt.Errorf("read messages that were sent: %w", err)
	}
	return ids, nil
}

// OweAgain owes messages that Sent returned to the stream of alerts again, under the same id. Those that the outbox
// owes already stay as they are.
func (s *Store) OweAgain(ctx context.Context, ids []string) error {
	return s.begin(ctx, "owe messages again", func(tx pgx.Tx) error {
		// The outbox keeps deliveries for some days only.
		forgotten, err := listAlerts(ctx, tx, alertsForgotten, ids, schema.SinkStream)
		if err != nil {
			return err
		}
		var outbox []outboxRow
		for _, a := range forgotten {
			rows, err := outboxRows(a, schema.SinkStream)
			if err != nil {
				return err
			}
			outbox = append(outbox, rows...)
		}
		b := &batch{}
		b.Queue(oweAgain, ids, schema.SinkStream)
		insert(b, "outbox", "ON CONFLICT DO NOTHING", outbox)
		b.notify(ChannelOutbox)
		return b.send(ctx, tx)
	})
}

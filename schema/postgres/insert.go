package postgres

import (
	"context"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// insertWon inserts everything that belongs to the verdicts that stand now.
func insertWon(ctx context.Context, tx pgx.Tx, round []*call, volume Volume) error {
	var (
		scores      []*scoreRow
		skips       []*skipRow
		deadLetters []*deadLetterRow
		alerts      []*alertRow
		outbox      []outboxRow
		reviews     []reviewRow
	)
	sums := newRollup()
	for _, c := range round {
		if !c.won {
			continue
		}
		sums.add(c)
		if c.score != nil {
			scores = append(scores, c.score)
		}
		if c.skip != nil {
			skips = append(skips, c.skip)
		}
		if c.deadLetter != nil && c.event != nil {
			deadLetters = append(deadLetters, c.deadLetter) // others are written already, by claimMessages
		}
		for i := range c.alerts {
			alerts = append(alerts, &c.alerts[i])
		}
		outbox = append(outbox, c.outbox...)
		if c.review != nil {
			reviews = append(reviews, *c.review)
		}
	}
	outbox, err := withhold(ctx, tx, volume, alerts, outbox)
	if err != nil {
		return err
	}
	b := &batch{}
	insert(b, "scores", "ON CONFLICT DO NOTHING", scores)
	insert(b, "skips", "ON CONFLICT DO NOTHING", skips)
	insert(b, "dead_letters", "ON CONFLICT (stream, sequence, digest) DO NOTHING", deadLetters)
	insertAlerts(b, alerts, outbox, reviews)
	sums.insert(b)
	return b.send(ctx, tx)
}

// withhold decides which alerts are only stored, and returns what is owed of the others.
func withhold(ctx context.Context, tx pgx.Tx, volume Volume, alerts []*alertRow, outbox []outboxRow,
) ([]outboxRow, error) {
	if err := applySilences(ctx, tx, alerts); err != nil {
		return nil, err
	}
	if err := applyBudgets(ctx, tx, volume, alerts); err != nil {
		return nil, err
	}
	for _, a := range alerts {
		if a.Delivery != schema.DispatchOwed {
			outbox = slices.DeleteFunc(outbox, func(o outboxRow) bool { return o.MessageID == a.ID })
		}
	}
	return outbox, nil
}

// insertAlerts adds the statements that write alerts, what is owed of them, and their reviews.
func insertAlerts(b *batch, alerts []*alertRow, outbox []outboxRow, reviews []reviewRow) {
	insert(b, "alerts", "ON CONFLICT DO NOTHING", alerts)
	insert(b, "outbox", "ON CONFLICT DO NOTHING", outbox)
	addRows(b, openReviews, reviews)
	if len(outbox) > 0 {
		b.notify(ChannelOutbox)
	}
	if len(reviews) > 0 {
		b.notify(ChannelReviews)
	}
}

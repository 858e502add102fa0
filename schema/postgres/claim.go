package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// write writes what the ledger has no verdict on yet.
func (s *Store) write(ctx context.Context, tx pgx.Tx, round []*call) error {
	if err := boundPayloads(ctx, tx, round); err != nil {
		return err
	}
	for _, c := range round {
		c.won, c.stands, c.err = false, nil, nil
	}
	if err := s.claimEvents(ctx, tx, round); err != nil {
		return err
	}
	if err := claimMessages(ctx, tx, round); err != nil {
		return err
	}
	if err := recordRepeats(ctx, tx, round); err != nil {
		return err
	}
	return insertWon(ctx, tx, round, s.config.Volume)
}

// claimEvents inserts events into the ledger. A call whose event is there already learns the verdict that stands. A
// score of an event that is older than scores are kept is refused.
func (s *Store) claimEvents(ctx context.Context, tx pgx.Tx, round []*call) error {
	calls := make(map[schema.Identity]*call, len(round))
	var events []*eventRow
	for _, c := range round {
		if c.event != nil {
			calls[c.event.identity()] = c
			events = append(events, c.event)
		}
	}
	if len(events) == 0 {
		return nil
	}
	input, err := json.Marshal(events)
	if err != nil {
		return err
	}
	rows, err := tx.Query(ctx, claimEvents, input, s.config.Maintenance.Scores, untaken)
	if err != nil {
		return err
	}
	won := 0
	var key schema.Identity
	var canary bool
	_, err = pgx.ForEachRow(rows, []any{&key.Source, &key.ID, &key.Model, &canary}, func() error {
		calls[key].won, calls[key].canary = true, canary
		won++
		return nil
	})
	if err != nil || won == len(events) {
		return err
	}
	if err := readStanding(ctx, tx, input, calls); err != nil {
		return err
	}
	return s.refuseOld(ctx, tx, calls)
}

// readStanding gives each call that did not win the verdict that stands on its event, or on its message: a dead letter
// may not claim its event.
func readStanding(ctx context.Context, tx pgx.Tx, events []byte, calls map[schema.Identity]*call) error {
	standing, err := list(ctx, tx, pgx.RowTo[eventRow], eventsStanding, events)
	if err != nil {
		return err
	}
	for _, row := range standing {
		if c := calls[row.identity()]; !c.won {
			c.stands = &row
		}
	}
	rows, err := tx.Query(ctx, deadLettersStanding, events)
	if err != nil {
		return err
	}
	var key schema.Identity
	var kind string
	_, err = pgx.ForEachRow(rows, []any{&key.Source, &key.ID, &key.Model, &kind}, func() error {
		if c := calls[key]; !c.won && (c.stands == nil || c.stands.Digest != c.event.Digest) {
			stands := *c.event
			stands.Outcome, stands.Reason = schema.OutcomeDeadLetter, kind
			c.stands = &stands
		}
		return nil
	})
	return err
}

// refuseOld refuses the scores that the ledger did not take because their events are too old.
func (s *Store) refuseOld(ctx context.Context, tx pgx.Tx, calls map[schema.Identity]*call) error {
	var oldest time.Time
	if err := tx.QueryRow(ctx, `SELECT now() - $1::interval`, s.config.Maintenance.Scores).Scan(&oldest); err != nil {
		return err
	}
	for _, c := range calls {
		switch {
		case c.won || c.stands != nil || !c.claims():
		case c.score != nil && c.event.EventTime.Before(oldest):
			c.err = s.tooOld(c.event.EventTime, oldest)
		default: // deleted by retention between the two statements
			return errors.New("the verdict that stands was just removed by retention")
		}
	}
	return nil
}

// claimMessages inserts the dead letters that claim their message only: it could not be decoded, nobody took it, or it
// uses the identifier of another event. If the message has a verdict already, that one stands.
func claimMessages(ctx context.Context, tx pgx.Tx, round []*call) error {
	var deadLetters []*deadLetterRow
	calls := map[messageKey]*call{}
	for _, c := range round {
		if c.stands != nil && c.stands.Digest != c.event.Digest {
			if c.deadLetter == nil {
				c.err = usedTwice(c.stands.Outcome)
				continue
			}
			c.stands = nil
		} else if c.event != nil && (c.claims() || c.stands != nil) {
			continue
		}
		deadLetters = append(deadLetters, c.deadLetter)
		calls[messageKey{c.deadLetter.Stream, c.deadLetter.Sequence, c.deadLetter.Digest}] = c
	}
	if len(deadLetters) == 0 {
		return nil
	}
	input, err := json.Marshal(deadLetters)
	if err != nil {
		return err
	}
	rows, err := tx.Query(ctx, claimDeadLetters, input)
	if err != nil {
		return err
	}
	won := 0
	var key messageKey
	_, err = pgx.ForEachRow(rows, []any{&key.stream, &key.sequence, &key.digest}, func() error {
		calls[key].won = true
		won++
		return nil
	})
	if err != nil || won == len(calls) {
		return err
	}
	for _, c := range calls {
		if !c.won {
			c.stands = &eventRow{Outcome: schema.OutcomeDeadLetter, Reason: string(c.deadLetter.Kind)}
		}
	}
	standing, err := list(ctx, tx, pgx.RowTo[eventRow], messagesStanding, input)
	for _, row := range standing {
		if c := calls[messageKey{row.Stream, row.Sequence, row.Digest}]; !c.won {
			c.stands = &row
		}
	}
	return err
}

// messageKey names a message of a stream.
type messageKey struct {
	stream   string
	sequence int64
	digest   string
}

// recordRepeats records the messages that repeat an event whose verdict another message got.
func recordRepeats(ctx context.Context, tx pgx.Tx, round []*call) error {
	var repeats []repeatRow
	for _, c := range round {
		if c.event == nil || c.stands == nil || c.stands.Digest != c.event.Digest {
			continue
		}
		if e := c.event; c.stands.Stream != e.Stream || c.stands.Sequence != e.Sequence {
			repeats = append(repeats, repeatRow{e.Stream, e.Sequence, e.Digest, e.Source, e.EventID, e.Model, e.Delivered})
		}
	}
	b := &batch{}
	insert(b, "repeats", "ON CONFLICT DO NOTHING", repeats)
	return b.send(ctx, tx)
}

const (
	maxPayloadsPerHour = 8 << 20 // bytes of payloads stored whole, of dead letters that are the producer's fault
	leastPayload       = 256     // bytes of a payload that are always stored
)

// boundPayloads cuts the payloads of dead letters that are the producer's fault if the last hour brought too many bytes
// of them. Transactions that run at the same time may exceed the bound by what they write.
func boundPayloads(ctx context.Context, tx pgx.Tx, round []*call) error {
	var large []*deadLetterRow
	for _, c := range round {
		if l := c.deadLetter; l != nil && len(l.Payload) > leastPayload && !l.ours() {
			large = append(large, l)
		}
	}
	if len(large) == 0 {
		return nil
	}
	var stored int
	if err := tx.QueryRow(ctx, payloadsOfLastHour, leastPayload).Scan(&stored); err != nil {
		return fmt.Errorf("read the size of payloads: %w", err)
	}
	for _, l := range large {
		if stored+len(l.Payload) > maxPayloadsPerHour {
			l.Payload, l.PayloadState = l.Payload[:leastPayload], payloadCut
			continue
		}
		stored += len(l.Payload)
	}
	return nil
}

package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/decuwatch/decuwatch/schema"
)

// Lookup returns the verdict that stands on an event, so that a redelivery need not be scored again. It returns false
// if the event has no verdict. The error is *schema.Invalid on the field id if the identifier has a verdict on an event
// of another digest.
func (s *Store) Lookup(ctx context.Context, of schema.Identity, digest string) (Recorded, bool, error) {
	var row eventRow
	err := s.pool.QueryRow(ctx, eventByIdentity, of.Source, of.ID, of.Model).Scan(&row)
	if errors.Is(err, pgx.ErrNoRows) {
		return Recorded{}, false, nil
	}
	if err != nil {
		return Recorded{}, false, fmt.Errorf("look up event %s: %w", of.ID, err)
	}
	if row.Digest != digest {
		return Recorded{}, false, usedTwice(row.Outcome)
	}
	r, err := s.standing(ctx, row)
	if err != nil {
		return Recorded{}, false, fmt.Errorf("look up event %s: %w", of.ID, err)
	}
	return r, true, nil
}

// Known reports whether a message needs no work: it has a verdict, or it repeats an event that has one. A repeat is
// recorded as settled first. The error is *schema.Invalid on the field id if the identity belongs to another event.
func (s *Store) Known(ctx context.Context, of schema.Identity, d schema.Delivery) (bool, error) {
	var settled bool
	var digest *string
	var outcome *schema.Outcome
	err := s.pool.QueryRow(ctx, messageKnown,
		of.Source, of.ID, d.Stream, int64(d.Sequence), d.Digest, of.Model).Scan(&settled, &digest, &outcome)
	switch {
	case err != nil:
		return false, fmt.Errorf("look up event %s: %w", of.ID, err)
	case settled:
		return true, nil
	case digest == nil:
		return false, nil
	case *digest != d.Digest:
		return false, usedTwice(*outcome)
	}
	_, err = s.pool.Exec(ctx, insertRepeat,
		d.Stream, int64(d.Sequence), d.Digest, of.Source, of.ID, of.Model, d.Delivered)
	if err != nil {
		return false, fmt.Errorf("record repeat of event %s: %w", of.ID, err)
	}
	return true, nil
}

// usedTwice is the refusal of an identifier that belongs to another event.
func usedTwice(outcome schema.Outcome) *schema.Invalid {
	return &schema.Invalid{Field: "id", Reason: fmt.Sprintf(
		"source and id are those of a different event of this model, which has its verdict (%s); give each event an id of "+
			"its own", outcome)}
}

// standing returns the verdict that a row of the ledger stands for.
func (s *Store) standing(ctx context.Context, e eventRow) (Recorded, error) {
	r := Recorded{Outcome: e.Outcome, Reason: e.Reason}
	if e.Outcome != schema.OutcomeScore {
		return r, nil
	}
	var row scoreRow
	err := s.pool.QueryRow(ctx, scoreOfEvent,
		e.EventTime, e.Source, e.EventID, text(e.EnsembleDigest), e.Model).Scan(&row)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return Recorded{}, err
	}
	if err == nil {
		r.Score = row.score()
	}
	r.AlertIDs, err = list(ctx, s.pool, pgx.RowTo[string], alertsOfEvent, e.Source, e.EventID, e.Model)
	return r, err
}

// ScoreByID returns the score of an event, with the digest of the message that it was made from. The error is
// ErrNotFound if it does not exist. An empty source or model is left out of the search; the error says so if several
// events are found.
func (s *Store) ScoreByID(ctx context.Context, of schema.Identity) (*schema.Score, error) {
	found, err := list(ctx, s.pool, pgx.RowTo[eventRow], eventsByID, of.ID, of.Source, of.Model)
	if err != nil {
		return nil, fmt.Errorf("read score of event %s: %w", of.ID, err)
	}
	switch {
	case len(found) == 0:
		return nil, s.refusedEvent(ctx, of)
	case len(found) > 1 && found[0].Source == found[1].Source:
		return nil, fmt.Errorf("event %s: several models have an event of this id (%s, %s), name the model", of.ID,
			found[0].Model, found[1].Model)
	case len(found) > 1:
		return nil, fmt.Errorf("event %s: several sources used this id (%s, %s), name the source", of.ID, found[0].Source,
			found[1].Source)
	case found[0].Outcome != schema.OutcomeScore:
		return nil, fmt.Errorf("event %s: its verdict is %s (%s): %w", of.ID, found[0].Outcome, found[0].Reason, ErrNotFound)
	}
	r, err := s.standing(ctx, found[0])
	if err != nil {
		return nil, fmt.Errorf("read score of event %s: %w", of.ID, err)
	}
	if r.Score == nil {
		return nil, fmt.Errorf("event %s: its score was dropped by retention: %w", of.ID, ErrNotFound)
	}
	return r.Score, nil
}

// refusedEvent returns why the ledger does not know an event: no message named it, or only messages that were refused.
func (s *Store) refusedEvent(ctx context.Context, of schema.Identity) error {
	var kind, field, reason string
	err := s.pool.QueryRow(ctx, deadLetterOfEvent, of.ID, of.Source, of.Model).Scan(&kind, &field, &reason)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return fmt.Errorf("event %s: %w", of.ID, ErrNotFound)
	case err != nil:
		return fmt.Errorf("read dead letter of event %s: %w", of.ID, err)
	}
	return fmt.Errorf("event %s: its verdict is %s (%s: %s %s): %w", of.ID, schema.OutcomeDeadLetter, kind, field, reason,
		ErrNotFound)
}

// SequenceVerdict is the verdict that one message of a stream got.
type SequenceVerdict struct {
	Sequence uint64
	Digest   string
	Source   string // "" if the message could not be decoded
	ID       string
	Outcome  schema.Outcome
	Reason   string // of a skip; kind of a dead letter
}

// VerdictsBySequence returns the verdicts that messages from <= sequence <= to of a stream got, in order of sequence.
// The outcome of a message that repeats an event is schema.OutcomeRepeat: Lookup finds the event's own.
func (s *Store) VerdictsBySequence(ctx context.Context, stream string, from, to uint64) ([]SequenceVerdict, error) {
	verdicts, err := list(ctx, s.pool, pgx.RowToStructByPos[SequenceVerdict], verdictsBySequence,
		stream, int64(from), int64(to))
	if err != nil {
		return nil, fmt.Errorf("read verdicts of stream %s: %w", stream, err)
	}
	return verdicts, nil
}

// Try adds to the attempts on a message, never below zero, and returns their sum. Adding nothing reads it.
func (s *Store) Try(ctx context.Context, d schema.Delivery, add schema.Tries) (schema.Tries, error) {
	var sum schema.Tries
	query, args := tries, []any{d.Stream, int64(d.Sequence), d.Digest}
	if add != (schema.Tries{}) {
		query = addTries
		args = append(args, add.Failed, add.HandedBack, add.Watched, add.Alone)
	}
	err := s.pool.QueryRow(ctx, query, args...).Scan(&sum.Failed, &sum.HandedBack, &sum.Watched, &sum.Alone)
	if errors.Is(err, pgx.ErrNoRows) {
		return schema.Tries{}, nil
	}
	if err != nil {
		return schema.Tries{}, fmt.Errorf("count attempts on message %d: %w", d.Sequence, err)
	}
	return sum, nil
}

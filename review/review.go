// Package review brings people into the loop: it gathers the evidence of each alert, serves the page on which a
// reviewer decides, keeps the verdicts, and estimates precision and recall from them.
package review

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Actions that change a review.
const (
	Acknowledge = "acknowledge" // somebody looks at it
	Resolve     = "resolve"     // with a verdict
	Reopen      = "reopen"      // takes a verdict back
	Assign      = "assign"
	Comment     = "comment"
)

// Bounds of what a reviewer gives.
const (
	MaxComment = 4000 // characters
	MaxName    = 64   // characters of a reviewer's name
)

var (
	// ErrRefused is returned for a change that the state of the review does not allow, or that is out of its bounds. The
	// text says what stands in its way; nothing was changed.
	ErrRefused = errors.New("refused")
	// ErrConflict is returned for a change that was decided on a version of the review which is not the newest. The text
	// says what the review is now; nothing was changed.
	ErrConflict = errors.New("somebody else was faster")
)

// Change is what a reviewer asks for.
type Change struct {
	Action   string               // Acknowledge, Resolve, Reopen, Assign or Comment
	Actor    string               // who, 1 to MaxName characters
	Verdict  schema.ReviewVerdict // of Resolve
	Assignee string               // of Assign: who, or empty for nobody
	Comment  string               // at most MaxComment characters; required for Comment
	Version  int                  // of the review that the reviewer saw. Defaults to the newest
}

// changed returns the review after the change. The error wraps ErrRefused.
func (c Change) changed(r postgres.Review, at time.Time) (postgres.Review, error) {
	refuse := func(format string, args ...any) (postgres.Review, error) {
		return r, fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
	}
	if err := checkName(c.Actor); err != nil {
		return refuse("the reviewer's name %s", err)
	}
	if n := utf8.RuneCountInString(c.Comment); n > MaxComment {
		return refuse("the comment has %d characters, the most is %d", n, MaxComment)
	}
	if !utf8.ValidString(c.Comment) || strings.ContainsRune(c.Comment, 0) {
		return refuse("the comment is not text in UTF-8")
	}
	switch c.Action {
	case Acknowledge:
		switch r.State {
		case schema.ReviewAcknowledged:
			return refuse("%s acknowledged it already", cmp.Or(r.Assignee, "somebody"))
		case schema.ReviewResolved:
			return refuse("it is resolved already (%s)", Words(r.Verdict))
		case schema.ReviewOpen:
		}
		r.State = schema.ReviewAcknowledged
		r.Assignee = cmp.Or(r.Assignee, c.Actor)
	case Resolve:
		if verdicts := schema.ReviewVerdicts(); !slices.Contains(verdicts, c.Verdict) {
			return refuse("the verdict is %q, must be one of %s", c.Verdict, schema.List(verdicts))
		}
		if r.State == schema.ReviewResolved {
			return refuse("it is resolved already (%s); reopen it to change the verdict", Words(r.Verdict))
		}
		r.State, r.Verdict, r.ResolvedAt = schema.ReviewResolved, c.Verdict, &at
		r.Assignee = cmp.Or(r.Assignee, c.Actor)
	case Reopen:
		if r.State != schema.ReviewResolved {
			return refuse("it is %s, not resolved", r.State)
		}
		r.State, r.Verdict, r.ResolvedAt = schema.ReviewOpen, "", nil
	case Assign:
		if c.Assignee != "" {
			if err := checkName(c.Assignee); err != nil {
				return refuse("the assignee's name %s", err)
			}
		}
		if r.Assignee == c.Assignee {
			return refuse("it is assigned to %s already", cmp.Or(r.Assignee, "nobody"))
		}
		r.Assignee = c.Assignee
	case Comment:
		if strings.TrimSpace(c.Comment) == "" {
			return refuse("the comment is empty")
		}
	default:
		return refuse("there is no action %q", c.Action)
	}
	return r, nil
}

// Words returns a constant of the review's or alert's as words: false_alarm is "false alarm".
func Words(constant any) string { return strings.ReplaceAll(fmt.Sprint(constant), "_", " ") }

func checkName(name string) error {
	switch n := utf8.RuneCountInString(name); {
	case strings.TrimSpace(name) != name || n < 1 || n > MaxName:
		return fmt.Errorf("must be 1 to %d characters without space around them", MaxName)
	case !utf8.ValidString(name):
		return errors.New("must be UTF-8")
	case strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }):
		return errors.New("must be printable characters")
	}
	return nil
}

// Apply changes the review with the given id, or with the only id that starts with it, and returns it as it is then. A
// verdict, and its withdrawal, goes to uncertainty.review.<model> through the outbox. Errors: postgres.ErrNotFound,
// ErrRefused, ErrConflict; nothing was changed then.
func (c Change) Apply(ctx context.Context, store *postgres.Store, id string) (postgres.Review, error) {
	c.Comment = strings.TrimSpace(strings.ReplaceAll(c.Comment, "\r\n", "\n"))
	now := time.Now().UTC().Truncate(time.Microsecond)
	before, err := store.ReviewByID(ctx, id)
	if err != nil {
		return before, err
	}
	if c.Version != 0 && c.Version != before.Version {
		return before, conflict(before)
	}
	after, err := c.changed(before, now)
	if err != nil {
		return before, fmt.Errorf("%s review %s: %w", c.Action, short(before.ID), err)
	}
	change := postgres.ReviewChange{Review: after, Action: c.Action, Actor: c.Actor, Comment: c.Comment, At: now}
	if c.Action == Resolve || c.Action == Reopen {
		message, err := c.message(ctx, store, after, now)
		if err != nil {
			return before, err
		}
		change.Messages = append(change.Messages, message)
	}
	_, err = store.ChangeReview(ctx, change)
	if errors.Is(err, postgres.ErrConflict) {
		if newest, err := store.ReviewByID(ctx, before.ID); err == nil {
			before = newest
		}
		return before, conflict(before)
	}
	if err != nil {
		return before, err
	}
	return store.ReviewByID(ctx, before.ID)
}

func conflict(now postgres.Review) error {
	state := string(now.State)
	if now.Verdict != "" {
		state += " as " + Words(now.Verdict)
	}
	if now.Assignee != "" {
		state += ", assigned to " + now.Assignee
	}
	return fmt.Errorf("review %s: %w: it is %s now (version %d); nothing was changed", short(now.ID), ErrConflict, state,
		now.Version)
}

// message returns the message of a verdict, or of its withdrawal.
func (c Change) message(
	ctx context.Context, store *postgres.Store, r postgres.Review, at time.Time,
) (schema.OutboxMessage, error) {
	event := schema.Review{
		ReviewID: r.ID, AlertID: r.AlertID, Version: r.Version + 1, State: r.State, Verdict: r.Verdict, Reviewer: c.Actor,
		Comment: c.Comment,
		Source:  r.Source, EventID: r.EventID, EventTime: r.EventTime.UTC(), Model: r.Model, ClassIndex: r.ClassIndex,
		ClassLabel: r.ClassLabel, At: at,
	}
	raised, err := store.AlertsOf(ctx, r.Identity())
	if err != nil {
		return schema.OutboxMessage{}, err
	}
	for _, a := range raised {
		event.AlertIDs = append(event.AlertIDs, a.ID)
	}
	score, err := store.ScoreByID(ctx, r.Identity())
	if err != nil && !errors.Is(err, postgres.ErrNotFound) { // retention may have dropped it
		return schema.OutboxMessage{}, err
	}
	if score != nil {
		event.ClassGap = score.ClassGap.Value
		if score.RequestRisk != nil {
			event.RequestRisk = &score.RequestRisk.Value
		}
		if score.ImageRisk != nil {
			event.ImageRisk = &score.ImageRisk.Value
		}
	}
	header, body, err := schema.EncodeReview(event)
	if err != nil {
		return schema.OutboxMessage{}, err
	}
	return schema.OutboxMessage{
		Sink: schema.SinkStream, AlertID: schema.ReviewMessageID(event), Subject: schema.ReviewSubject(event),
		Header: header, Body: body,
	}, nil
}

// tail returns an id shortened to its end. Ids that are made one after the other often begin alike.
func tail(id string) string {
	const most = 16
	if runes := []rune(id); len(runes) > most {
		return "…" + string(runes[len(runes)-most+1:])
	}
	return id
}

// short returns the beginning of an id, as it is shown.
func short(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// Unmarked returns a review without what distinguishes an alert from a request drawn at random, unless it is resolved:
// a list must not bias the verdict.
func Unmarked(r postgres.Review) postgres.Review {
	if r.State != schema.ReviewResolved {
		r.Kind, r.AlertID, r.Severity, r.Reason, r.Measurement = "", "", "", "", ""
	}
	return r
}

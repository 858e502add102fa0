package consumers

import (
	"context"
	"errors"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/schema"
)

// Unavailable returns err as one that says nothing about the message: something that every message needs is away, slow,
// locked or full. The message is kept and tried again when it is back, and no delivery is used up, however long that
// takes; meanwhile nothing is pulled. Any error with a method Unavailable() bool that returns true is read in the same
// way. A nil err stays nil.
func Unavailable(err error) error {
	if err == nil {
		return nil
	}
	return &unavailable{err}
}

type unavailable struct{ error }

func (u *unavailable) Unwrap() error     { return u.error }
func (u *unavailable) Unavailable() bool { return true }

func isUnavailable(err error) bool {
	var u interface{ Unavailable() bool }
	return errors.As(err, &u) && u.Unavailable()
}

// action is what becomes of a message.
type action string

const (
	acknowledge action = "ack"
	deadLetter  action = "dead_letter" // write a dead letter, then terminate
	redeliver   action = "retry"       // after a delay
	release     action = "release"     // soon, and to another worker: this one stops, or its device is away
	abandon     action = "abandon"     // say nothing: the message was left to another worker
)

// decision is an action with what it needs and why.
type decision struct {
	action action
	kind   schema.DeadLetterKind // of the dead letter
	field  string                // that the dead letter names
	reason string
	delay  time.Duration
}

// decide reads a handler's error as what becomes of its message. It is the only place that does. Failed is how many
// attempts on the message have failed, with this one. Draining says that the worker has run out of time to stop.
func (c Config) decide(err error, failed int, draining bool) decision {
	var invalid *schema.Invalid
	var kinded interface{ DeadLetterKind() schema.DeadLetterKind }
	switch {
	case err == nil:
		return decision{action: acknowledge}
	case errors.As(err, &kinded):
		d := decision{action: deadLetter, kind: kinded.DeadLetterKind(), reason: clean(err.Error())}
		if errors.As(err, &invalid) {
			d.field, d.reason = invalid.Field, clean(invalid.Reason)
		}
		return d
	case errors.As(err, &invalid):
		return decision{action: deadLetter, kind: schema.KindInvalid, field: invalid.Field, reason: clean(invalid.Reason)}
	case draining:
		return decision{action: release, reason: clean(err.Error())}
	case failed >= c.MaxDeliver:
		return decision{action: deadLetter, kind: schema.KindFailed, reason: clean(err.Error())}
	default:
		return decision{action: redeliver, reason: clean(err.Error()), delay: c.retryDelay(failed)}
	}
}

// retryDelay is the time before the attempt that follows the given number of them.
func (c Config) retryDelay(attempts int) time.Duration {
	return backoff.After(attempts, c.RetryDelay, c.RetryMaxDelay)
}

// maxReason is the length of a dead letter's reason, in bytes, at most.
const maxReason = 1024

// clean makes a text fit to be stored as a reason and to stand in one line: valid UTF-8 without control characters,
// bounded, not empty.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if strings.TrimSpace(s) == "" {
		return "no reason was given"
	}
	if len(s) <= maxReason {
		return s
	}
	cut := maxReason
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut]
}

// drained reports whether the work's context ended because a drain ran out of time, or the process gave up.
func drained(work context.Context) bool { return work.Err() != nil }

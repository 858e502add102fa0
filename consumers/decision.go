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

// Unavailable marks an error that says nothing about the message: something that every message needs is away, slow,
// locked or full. Nothing is pulled until it is back. The message is kept and then tried again, and the attempt does
// not count. Any error with a method Unavailable() bool that returns true has the same effect. A nil err stays nil.
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

// decide decides what becomes of a message after a handler's error. Failed is how many attempts on the message have
// failed, including this one. Draining means that the drain has run out of time.
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

// retryDelay returns how long to wait after a number of attempts.
func (c Config) retryDelay(attempts int) time.Duration {
	return backoff.After(attempts, c.RetryDelay, c.RetryMaxDelay)
}

// maxReason is the maximum length of a dead letter's reason in bytes.
const maxReason = 1024

// clean returns s as one line that can be stored as a reason: valid UTF-8 without control characters, not empty, and at
// most maxReason bytes.
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

// drained reports whether work has ended because a drain has run out of time.
func drained(work context.Context) bool { return work.Err() != nil }

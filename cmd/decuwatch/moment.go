package main

import (
	"fmt"
	"time"
)

// moment is a time that a flag names: in RFC 3339, as a date in UTC, or as a duration before now.
type moment struct{ time.Time }

// UnmarshalText reads it.
func (m *moment) UnmarshalText(text []byte) error {
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if at, err := time.Parse(layout, string(text)); err == nil {
			m.Time = at.UTC()
			return nil
		}
	}
	if ago, err := time.ParseDuration(string(text)); err == nil && ago >= 0 {
		m.Time = time.Now().UTC().Add(-ago).Truncate(time.Microsecond)
		return nil
	}
	return fmt.Errorf("%q is no time, must be as 2026-11-25T08:00:00Z, a date as 2026-11-25, or how long ago, as 72h",
		text)
}

// or returns the moment, or another if the flag was not given.
func (m *moment) or(other time.Time) time.Time {
	if m == nil {
		return other
	}
	return m.Time
}

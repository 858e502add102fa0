package schema

import "time"

// OutboxMessage is one alert that waits for one sink.
type OutboxMessage struct {
	ID        int64
	Sink      Sink
	AlertID   string
	Subject   string
	Header    map[string][]string
	Body      []byte
	Attempts  int // failed so far
	CreatedAt time.Time
}

// OutboxStats is what is due at one sink.
type OutboxStats struct {
	Sink    Sink
	Pending int64
	Oldest  time.Duration // age of the oldest that is due; 0 if Pending is 0
}

package faults

import (
	"strings"
	"sync/atomic"
	"time"
)

// stage is a moment in the life of an event, as a frame on the worker's connections.
type stage struct {
	name string
	// nats says whether the frame is on the connection to NATS or to Postgres.
	nats bool
	// passes is how often the stage occurs in a small backlog: once for each event, or once for each batch.
	passes int64
	is     func(f *frame) bool
}

// deliveredEvent reports whether a frame delivers a message of the stream of events.
func deliveredEvent(f *frame) bool {
	return !f.fromClient && strings.HasPrefix(f.reply, "$JS.ACK.") && strings.Contains(f.reply, "."+eventStream+".")
}

// settles returns a function that reports whether a frame acknowledges an event with a word.
func settles(word string) func(*frame) bool {
	return func(f *frame) bool {
		return f.fromClient && f.kind == "PUB" && strings.HasPrefix(f.text, "$JS.ACK.") &&
			strings.Contains(f.text, "."+eventStream+".") && strings.HasPrefix(string(f.body), word)
	}
}

func commits(f *frame, table string) bool {
	return f.fromClient && f.kind == "Q" && f.text == "commit" && f.conn.wrote("INSERT INTO decuwatch."+table)
}

// stages are the moments at which a worker is killed: just before the frame is forwarded, or just after.
var stages = []stage{
	{"delivered", true, 12, deliveredEvent},
	{"writing", false, 3, func(f *frame) bool {
		return f.fromClient && strings.Contains(f.text, "INSERT INTO decuwatch.scores")
	}},
	{"committing", false, 3, func(f *frame) bool { return commits(f, "scores") }},
	{"committed", false, 3, func(f *frame) bool {
		return !f.fromClient && f.kind == "C" && f.text == "COMMIT" && f.conn.wrote("INSERT INTO decuwatch.scores")
	}},
	{"acknowledging", true, 12, settles("+ACK")},
	{"dead-lettering", false, 2, func(f *frame) bool { return commits(f, "dead_letters") }},
	{"terminating", true, 2, settles("+TERM")},
	{"leasing-alerts", false, 3, func(f *frame) bool {
		return f.fromClient && strings.Contains(f.text, "UPDATE decuwatch.outbox o SET next_attempt_at")
	}},
	{"publishing-alert", true, 12, func(f *frame) bool {
		return f.fromClient && strings.HasPrefix(f.text, "uncertainty.alert.")
	}},
	{"alert-delivered", false, 3, func(f *frame) bool {
		return f.fromClient && strings.Contains(f.text, "UPDATE decuwatch.outbox SET delivered_at")
	}},
}

// strike calls what when the n-th frame of a stage passes, before or after it is forwarded.
func (r *run) strike(s stage, n int64, after bool, what func()) {
	p := r.postgresProxy
	if s.nats {
		p = r.natsProxy
	}
	var left atomic.Int64
	left.Store(n)
	p.setHook(func(f *frame) (bool, func()) {
		if !s.is(f) || left.Add(-1) != 0 {
			return false, nil
		}
		p.setHook(nil)
		if after {
			return false, what
		}
		what()
		return true, nil
	})
}

// killAt kills a worker at a stage or a time that the seed draws, and returns when it has ended.
func (r *run) killAt(w *process) {
	r.t.Helper()
	draw := r.rng.IntN(len(stages) + 3)
	if draw >= len(stages) { // at a time: during the start, during a computation, or later
		most := []time.Duration{150 * time.Millisecond, 600 * time.Millisecond, 1500 * time.Millisecond}[draw-len(stages)]
		d := r.between(0, most)
		time.Sleep(d) // the moment of the fault
		w.kill()
		r.broke("SIGKILL %s after the start", d.Round(time.Millisecond))
		return
	}
	s, n, after := stages[draw], 1+r.rng.Int64N(stages[draw].passes), r.rng.IntN(2) == 0
	r.strike(s, n, after, w.kill)
	when := "before"
	if after {
		when = "after"
	}
	select {
	case <-w.ended:
		r.broke("SIGKILL %s %s, pass %d", when, s.name, n)
	case <-time.After(5 * time.Second): // the backlog was too small
		w.kill()
		r.broke("SIGKILL at rest, %s did not pass %d times", s.name, n)
	}
	r.natsProxy.setHook(nil)
	r.postgresProxy.setHook(nil)
}

package consumers

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// pulling knows whether the loops take messages. Its zero value says that they have not begun.
type pulling struct {
	mu    sync.Mutex
	loops map[string]pull
}

// pull is how one loop fares.
type pull struct {
	err   error     // what keeps it from pulling; nil while it pulls
	since time.Time // of err
}

var (
	errNotPulling = errors.New("does not pull yet")
	errPaused     = errors.New("is paused because a dependency is away")
)

// err returns nil if every loop pulls, else what keeps each of the others from it.
func (p *pulling) err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.loops) == 0 {
		return errNotPulling
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(p.loops)) {
		if l := p.loops[name]; l.err != nil {
			errs = append(errs, fmt.Errorf("consumer %s, for %s: %w", name, time.Since(l.since).Round(time.Second), l.err))
		}
	}
	return errors.Join(errs...)
}

// set says how a loop fares.
func (p *pulling) set(name string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note(name, err)
}

// note is set for callers that hold the mutex.
func (p *pulling) note(name string, err error) {
	if p.loops == nil {
		p.loops = map[string]pull{}
	}
	l, known := p.loops[name]
	if !known || (err == nil) != (l.err == nil) {
		l.since = time.Now()
	}
	l.err = err
	p.loops[name] = l
}

// begin says that a loop has asked for messages: it pulls, unless the returned function is called at once.
func (p *pulling) begin(name string) (end func()) {
	const settled = 500 * time.Millisecond
	ended := false
	timer := time.AfterFunc(settled, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !ended {
			p.note(name, nil)
		}
	})
	return func() {
		timer.Stop()
		p.mu.Lock()
		defer p.mu.Unlock()
		ended = true
	}
}

package consumers

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// pulling knows whether the loops pull messages. Its zero value says that they have not started.
type pulling struct {
	mu    sync.Mutex
	loops map[string]pull
}

// pull is the state of one loop.
type pull struct {
	err   error     // why it does not pull; nil while it pulls
	since time.Time // of err
}

var (
	errNotPulling = errors.New("does not pull yet")
	errPaused     = errors.New("is paused because a dependency is away")
)

// err returns nil if every loop pulls. The error says why each of the other loops does not.
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

// set sets the state of a loop.
func (p *pulling) set(name string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note(name, err)
}

// note is like set, for callers that have locked the mutex.
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

// begin says that a loop has requested messages. It pulls, unless the request ends at once.
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

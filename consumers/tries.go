package consumers

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/decuwatch/decuwatch/schema"
)

// Tries counts the attempts on messages that did not end in a verdict.
type Tries interface {
	// Try adds to the attempts on a message, never below zero, and returns their sums. Adding nothing reads them.
	Try(ctx context.Context, d schema.Delivery, add schema.Tries) (schema.Tries, error)
}

// A message may end the process that handles it, together with the other messages in flight there, and nobody knows
// which message did. So a message whose workers were killed or hung is handled among fewer and fewer others, and at
// last alone. Then a harmless message gets its verdict, and a message that ends its workers is found.
const (
	ordinary isolation = iota
	watched            // at most watchedAtOnce of them at a time
	alone              // nothing else is handled by this worker
)

// isolation says among which other messages a message is handled.
type isolation int

const (
	endsToWatch   = 2  // attempts without a known end after which a message is watched
	watchedAtOnce = 16 // watched messages that are handled at once
	endsAlone     = 3  // attempts alone without a known end after which a message is a dead letter
)

// rows returns how many of all rows an event of the given cost takes.
func (p isolation) rows(cost, all int) int64 {
	switch p {
	case watched:
		cost = max(cost, all/watchedAtOnce)
	case alone:
		cost = all
	case ordinary:
	}
	return int64(min(max(cost, 1), all))
}

// isolation decides among which others a message is handled. If too many workers ended while they handled it alone, the
// error makes it a dead letter.
func (r *Runner) isolation(work context.Context, in incoming) (isolation, error) {
	if in.delivery.Delivered <= endsToWatch {
		return ordinary, nil
	}
	sum, err := r.try(work, in.delivery, schema.Tries{})
	if err != nil {
		return ordinary, err
	}
	p, err := isolationOf(in.delivery.Delivered, sum)
	if p != ordinary {
		r.log.Warn("workers ended while they handled this event", "model", in.model, "sequence", in.delivery.Sequence,
			"delivered", in.delivery.Delivered, "failed", sum.Failed, "handed_back", sum.HandedBack, "alone", p == alone,
			"source", in.event.Source, "id", in.event.ID)
	}
	return p, err
}

// isolationOf decides the isolation by the counts of attempts.
func isolationOf(delivered int, sum schema.Tries) (isolation, error) {
	switch {
	case sum.Alone >= endsAlone:
		return alone, endedAlone(sum.Alone)
	case sum.Alone > 0 || sum.Watched > 0:
		return alone, nil
	case delivered-1-sum.Failed-sum.HandedBack >= endsToWatch:
		return watched, nil
	}
	return ordinary, nil
}

// endedAlone is the error of a message that is given up. Its value is how many workers ended while they handled it
// alone.
type endedAlone int

func (n endedAlone) Error() string {
	return fmt.Sprintf("%d workers ended while they handled it alone", int(n))
}

// DeadLetterKind makes the message a dead letter.
func (endedAlone) DeadLetterKind() schema.DeadLetterKind { return schema.KindGivenUp }

// begins returns what is added to the counts when n attempts begin. It is subtracted when an attempt has ended.
func (p isolation) begins(n int) schema.Tries {
	switch p {
	case watched:
		return schema.Tries{Watched: n}
	case alone:
		return schema.Tries{Alone: n}
	case ordinary:
	}
	return schema.Tries{}
}

// begin records that an attempt begins, if it would count without a known end.
func (r *Runner) begin(work context.Context, d schema.Delivery, p isolation) error {
	if p == ordinary {
		return nil
	}
	_, err := r.try(work, d, p.begins(1))
	return err
}

// countFailure records that an attempt failed, and returns how many have.
func (r *Runner) countFailure(work context.Context, d schema.Delivery, p isolation) (int, error) {
	add := p.begins(-1)
	add.Failed = 1
	sum, err := r.try(work, d, add)
	return sum.Failed, err
}

// handBackTimeout bounds handBack. A worker that stops has no time left.
const handBackTimeout = time.Second

// handBack records that the worker gives a message back although nothing is wrong with it. Otherwise the attempt would
// count as one without a known end.
func (r *Runner) handBack(work context.Context, d schema.Delivery, p isolation) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(work), handBackTimeout)
	defer cancel()
	add := p.begins(-1)
	add.HandedBack = 1
	_, err := r.cfg.Tries.Try(ctx, d, add)
	return err
}

// noteHandBack calls handBack and logs its error.
func (r *Runner) noteHandBack(work context.Context, d schema.Delivery, p isolation) {
	if err := r.handBack(work, d, p); err != nil {
		r.log.Warn("that a message was handed back is not noted", "sequence", d.Sequence, "err", err)
	}
}

// try counts attempts. While a dependency is away, it waits and tries again.
func (r *Runner) try(work context.Context, d schema.Delivery, add schema.Tries) (sum schema.Tries, err error) {
	err = r.write(work, func(ctx context.Context) error {
		sum, err = r.cfg.Tries.Try(ctx, d, add)
		return err
	})
	if err != nil {
		return sum, fmt.Errorf("count attempts: %w", err)
	}
	return sum, nil
}

// memoryTries counts attempts in memory.
type memoryTries struct {
	mu   sync.Mutex
	sums map[schema.Delivery]schema.Tries
}

func (m *memoryTries) Try(_ context.Context, d schema.Delivery, add schema.Tries) (schema.Tries, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := schema.Delivery{Stream: d.Stream, Sequence: d.Sequence, Digest: d.Digest}
	sum := m.sums[key]
	for _, c := range []struct {
		sum *int
		add int
	}{{&sum.Failed, add.Failed}, {&sum.HandedBack, add.HandedBack}, {&sum.Watched, add.Watched}, {&sum.Alone, add.Alone}} {
		*c.sum = max(0, *c.sum+c.add)
	}
	if add != (schema.Tries{}) {
		m.sums[key] = sum
	}
	return sum, nil
}

// Package budget bounds the rows of backbone work that the events of a model cost. The workers of a model share its
// budget through Postgres. When it is used up, or when the oldest event waits for too long, fewer events are scored:
// they wait in the stream, or a lot decides with a recorded probability, or they are recorded as skipped.
package budget

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Store is the part of [postgres.Store] that the workers share their budgets through.
type Store interface {
	SpendRows(ctx context.Context, model string, size postgres.Bucket, least, most float64) (postgres.Spending, error)
	BookRows(ctx context.Context, model string, size postgres.Bucket, rows float64) (postgres.Spending, error)
	ChangeShare(ctx context.Context, model string, from, to float64, reason string) error
	LeastShare(ctx context.Context, model string, since time.Time) (float64, error)
}

// Options are what [New] needs beside its settings.
type Options struct {
	Models     []string
	MaxAge     time.Duration // of the stream, until Observe says what the server has
	Registerer prometheus.Registerer
	Log        *slog.Logger // Defaults to slog.Default
}

// Budgets are the budgets of the models that a worker scores.
type Budgets struct {
	config   Config
	store    Store
	accounts map[string]*account
	log      *slog.Logger
}

// account is a worker's part in the budget of a model.
type account struct {
	Rule
	model string
	store Store
	turn  chan struct{} // who holds it asks the store for rows

	mu      sync.Mutex
	left    float64 // rows that were taken from the store and not used; negative: used and not booked
	idle    bool    // no row was taken since the last tick
	waiting int     // deferred events that this worker holds
	share   float64 // in force
	readAt  time.Time
	missing postgres.Bucket
	backlog Backlog
	seenAt  time.Time // the backlog
}

// Backlog is what waits in the stream for a model.
type Backlog struct {
	Events int           // that have no verdict
	Oldest time.Duration // age of the oldest of them
	MaxAge time.Duration // age at which the stream drops an event; 0 means never
}

const (
	tickEvery = time.Second
	stale     = 30 * time.Second // age at which a share is read again before it is used
	margin    = time.Hour        // before its message expires, a deferred event is skipped; at most a tenth of MaxAge
	patience  = 5 * time.Second  // longest time between two looks into an empty bucket
)

// New returns the budgets of some models.
func New(c Config, store Store, o Options) (*Budgets, error) {
	c = settings.WithDefaults(c)
	if err := c.Check(); err != nil {
		return nil, err
	}
	b := &Budgets{config: c, store: store, accounts: map[string]*account{}, log: cmp.Or(o.Log, slog.Default())}
	for _, model := range o.Models {
		a := &account{Rule: c.For(model), model: model, store: store, turn: make(chan struct{}, 1), share: 1}
		a.backlog.MaxAge = o.MaxAge
		b.accounts[model] = a
	}
	for _, r := range c.Rules {
		if r.Model != "" && b.accounts[r.Model] == nil {
			b.log.Warn("a budget is for a model that this worker does not score", "model", r.Model)
		}
	}
	register(o.Registerer, b.accounts)
	return b, nil
}

// Run keeps the shares of the models up to date until ctx ends. Then it gives rows back that were not used.
func (b *Budgets) Run(ctx context.Context) error {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		for _, a := range b.accounts {
			if err := b.tick(ctx, a); err != nil && ctx.Err() == nil {
				b.log.Warn("the budget cannot be read", "model", a.model, "err", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return b.close(ctx)
		}
	}
}

func (b *Budgets) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	var errs []error
	for _, a := range b.accounts {
		if a.bounded() {
			_, err := a.book(ctx, true)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// tick books what was used, and changes the share of a model if it should be another.
func (b *Budgets) tick(ctx context.Context, a *account) error {
	if !a.bounded() && a.MaxWait == 0 {
		return nil
	}
	p, err := a.book(ctx, false)
	if err != nil {
		return err
	}
	share, reason := a.target(time.Now(), b.config.LeastShare)
	if share == p.Share {
		return nil
	}
	b.log.Info("the share of events that are scored changes", "model", a.model, "from", p.Share, "to", share,
		"reason", reason)
	if err := b.store.ChangeShare(ctx, a.model, p.Share, share, reason); err != nil {
		return err
	}
	_, err = a.book(ctx, false)
	return err
}

// book books the rows that were used, and reads what is missing from the bucket and the share in force. It gives rows
// back that nobody used since the last call, or all of them.
func (a *account) book(ctx context.Context, all bool) (postgres.Spending, error) {
	a.mu.Lock()
	rows := 0.0
	if a.left < 0 || a.idle || all {
		rows = -a.left
	}
	a.left += rows
	a.idle = true
	a.mu.Unlock()
	p, err := a.store.BookRows(ctx, a.model, a.size(), rows)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.left -= rows
		return p, err
	}
	a.note(p)
	return p, nil
}

// note keeps what the store said. The caller has locked the mutex.
func (a *account) note(p postgres.Spending) {
	a.missing, a.share, a.readAt = p.Missing, p.Share, time.Now()
}

func (a *account) size() postgres.Bucket {
	return postgres.Bucket{Hour: float64(a.RowsPerHour), Day: float64(a.RowsPerDay)}
}

// Observe says what waits in the stream for a model.
func (b *Budgets) Observe(model string, backlog Backlog) {
	a := b.accounts[model]
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.backlog, a.seenAt = backlog, time.Now()
}

// target returns the share that should be in force now, and why. A share changes in steps, so that it does not change
// all the time.
func (a *account) target(now time.Time, least float64) (share float64, reason string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	wanted, reason := 1.0, "there is room, and no event waits for too long"
	lower := func(to float64, format string, args ...any) {
		if to < wanted {
			wanted, reason = to, fmt.Sprintf(format, args...)
		}
	}
	if a.Policy == Sample {
		for _, p := range []struct {
			period        string
			size, missing float64
		}{{"hour", float64(a.RowsPerHour), a.missing.Hour}, {"day", float64(a.RowsPerDay), a.missing.Day}} {
			if p.size > 0 {
				lower(forRoom(p.size, p.missing), "%.0f of the %.0f rows of the %s are left", max(0, p.size-p.missing), p.size,
					p.period)
			}
		}
	}
	if a.MaxWait > 0 && a.backlog.Oldest > a.MaxWait {
		lower(float64(a.MaxWait)/float64(a.backlog.Oldest), "the oldest event waits for %s, at most %s is wanted",
			a.backlog.Oldest.Round(time.Second), a.MaxWait)
	}
	return step(a.share, wanted, least), reason
}

// forRoom returns the share for a bucket. It falls once less than half of the bucket is left, so that the rows that are
// spent settle at the rate at which it refills.
func forRoom(size, missing float64) float64 { return max(0, min(1, 2*(size-missing)/size)) }

// steps is how many steps halve a share.
const steps = 4

// step returns the share that follows on one in force: the wanted one in whole steps, at least least. It rises by two
// steps or not at all, unless it rises to 1.
func step(inForce, wanted, least float64) float64 {
	down := func(share float64) float64 { return -steps * math.Log2(share) }
	to := math.Ceil(down(max(wanted, least)) - 1e-9)
	if was := down(inForce); to > 0 && to < was && to > was-2 {
		return inForce
	}
	if to <= 0 {
		return 1
	}
	return max(least, math.Exp2(-to/steps))
}

// Share returns the share of a model's events that is scored, beside what the sampling rules say. For a message that
// was delivered before, it is the least one that was in force since the message came: an earlier delivery drew with one
// of these, so the event would be scored less often than a greater share says.
func (b *Budgets) Share(ctx context.Context, model string, d schema.Delivery) (float64, error) {
	a := b.accounts[model]
	if a == nil || a.Policy != Sample && a.MaxWait == 0 {
		return 1, nil
	}
	a.mu.Lock()
	share, old := a.share, time.Since(a.readAt) > stale
	a.mu.Unlock()
	if old {
		p, err := a.book(ctx, false)
		if err != nil {
			return 0, err
		}
		share = p.Share
	}
	if d.Delivered <= 1 {
		return share, nil
	}
	least, err := a.store.LeastShare(ctx, model, d.Time.Add(-2*stale))
	return min(share, least), err
}

// Take takes the rows of an event from the budget of its model. It returns false if there is no room and the policy is
// to skip. With the policy to defer it waits for room; shortly before the stream would drop the message it returns
// false.
func (b *Budgets) Take(ctx context.Context, model string, rows int, d schema.Delivery) (bool, error) {
	a := b.accounts[model]
	if a == nil || !a.bounded() {
		return true, nil
	}
	if a.take(float64(rows), a.Policy == Sample) {
		return true, nil
	}
	if a.Policy == Skip {
		return a.lease(ctx, float64(rows))
	}
	select {
	case a.turn <- struct{}{}:
		taken, err := a.ask(ctx, float64(rows))
		<-a.turn
		if taken || err != nil {
			return taken, err
		}
	default: // other events wait already
	}
	a.held(1)
	defer a.held(-1)
	for {
		expires, bounded := a.expires(d)
		if bounded && !time.Now().Before(expires) {
			return false, nil
		}
		wait, cancel := ctx, context.CancelFunc(func() {})
		if bounded {
			wait, cancel = context.WithDeadline(ctx, expires)
		}
		taken, err := a.await(wait, float64(rows))
		cancel()
		switch {
		case taken:
			return true, nil
		case ctx.Err() != nil || wait.Err() == nil: // else it expires
			return false, err
		}
	}
}

// take takes rows that are there, or in any case.
func (a *account) take(rows float64, anyway bool) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.left < rows && !anyway {
		return false
	}
	a.left -= rows
	a.idle = false
	return true
}

// lease takes the rows of an event, after it has asked the store for them, and for those of some further events.
func (a *account) lease(ctx context.Context, rows float64) (bool, error) {
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	return a.ask(ctx, rows)
}

// ask is lease, for a caller that has the turn.
func (a *account) ask(ctx context.Context, rows float64) (bool, error) {
	if a.take(rows, false) { // somebody else asked for more than they needed
		return true, nil
	}
	const ahead, part = 32, 100 // events, and the part of a bucket that one worker holds at most
	most := ahead * rows
	for _, size := range []Rows{a.RowsPerHour, a.RowsPerDay} {
		if size > 0 {
			most = min(most, float64(size)/part)
		}
	}
	p, err := a.store.SpendRows(ctx, a.model, a.size(), rows, max(rows, most))
	if err != nil {
		return false, err
	}
	a.mu.Lock()
	a.left += p.Granted
	a.note(p)
	a.mu.Unlock()
	return p.Granted > 0 && a.take(rows, false), nil
}

// await takes the rows of an event as soon as there is room, or returns an error when ctx ends. One event looks into
// the bucket, the others queue behind it.
func (a *account) await(ctx context.Context, rows float64) (bool, error) {
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	for {
		if taken, err := a.ask(ctx, rows); taken || err != nil {
			return taken, err
		}
		timer := time.NewTimer(a.untilRoom(rows))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return false, context.Cause(ctx)
		}
	}
}

// untilRoom returns when it is time to look into the bucket again.
func (a *account) untilRoom(rows float64) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	wait := 0.0 // seconds
	for _, p := range []struct{ size, missing, seconds float64 }{
		{float64(a.RowsPerHour), a.missing.Hour, 3600}, {float64(a.RowsPerDay), a.missing.Day, 86400},
	} {
		if p.size > 0 {
			wait = max(wait, (min(rows, p.size)-p.size+p.missing)/p.size*p.seconds)
		}
	}
	return min(patience, time.Duration(wait*float64(time.Second))+10*time.Millisecond)
}

// Give gives rows back that an event did not need.
func (b *Budgets) Give(model string, rows int) {
	a := b.accounts[model]
	if a == nil || !a.bounded() {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.left += float64(rows)
}

func (a *account) held(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting += n
}

// expires returns when a deferred event is skipped, because the stream would drop its message soon. The second result
// is false if it never does.
func (a *account) expires(d schema.Delivery) (time.Time, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	age := a.backlog.MaxAge
	return d.Time.Add(age - min(margin, age/10)), age > 0 && !d.Time.IsZero()
}

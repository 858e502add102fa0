package consumers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/internal/modelname"
	"github.com/decuwatch/decuwatch/schema"
)

// Ledger has the verdicts. Its clock decides how old a verdict is.
type Ledger interface {
	// Settled returns the messages from <= sequence <= to of a stream that have a verdict, in order of sequence. Messages
	// that repeat an event are among them.
	Settled(ctx context.Context, stream string, from, to uint64) ([]schema.Settled, error)
	// Known reports whether a message has its verdict, or repeats an event that has one; it records a repeat. The error is
	// a *schema.Invalid if the identity belongs to another event.
	Known(ctx context.Context, of schema.Identity, d schema.Delivery) (bool, error)
	// Position returns how far the stream that was created at the given time has been swept. An unknown stream starts at
	// first.
	Position(ctx context.Context, stream string, created time.Time, first uint64) (uint64, error)
	// Advance moves the position, and reports false if somebody else has moved it since.
	Advance(ctx context.Context, stream string, created time.Time, from, to uint64) (bool, error)
	// SettledBefore returns the highest sequence number from first to last up to which every message got its verdict more
	// than age ago, or first-1.
	SettledBefore(ctx context.Context, stream string, first, last uint64, age time.Duration) (uint64, error)
	// Orphans returns how many messages of a subject, above a sequence number, are dead letters.
	Orphans(ctx context.Context, stream, subject string, above uint64) (int, error)
}

// settingsState is what the keeper last found wrong with the settings of stream and consumers.
type settingsState struct {
	mu  sync.Mutex
	err error
}

func (s *settingsState) get() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// set returns whether the error has changed.
func (s *settingsState) set(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := text(err) != text(s.err)
	s.err = err
	return changed
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// keeper watches the stream as a whole. Every worker runs one. All that a keeper does is safe to do twice.
type keeper struct {
	*Runner
	owners  *owners
	metrics *keeperMetrics
	warned  map[string]string // last error that was logged, by topic
	swept   *sweeper
}

// round is what one look at the stream found.
type round struct {
	view   *View
	owners map[string]owner // by subject
}

// owner says who takes the events of a subject, and since when nobody does.
type owner struct {
	Ownership
	since time.Time
	seen  time.Time // since when this process has seen it
}

func newKeeper(r *Runner) *keeper {
	quiet := max(r.cfg.AckWait, r.cfg.HandleTimeout) + 2*r.cfg.PullExpiry
	return &keeper{
		Runner: r, owners: newOwners(r.cfg.Models, quiet), metrics: r.cfg.Metrics.keeper, warned: map[string]string{},
		swept: newSweeper(r),
	}
}

// run looks at the stream at an interval until ctx ends. A goroutine of its own sweeps what was found, because it waits
// while a dependency is away.
func (k *keeper) run(ctx, work context.Context) {
	rounds := make(chan round, 1)
	var sweeping sync.WaitGroup
	sweeping.Go(func() {
		for r := range rounds {
			k.swept.sweep(ctx, work, r)
		}
	})
	defer sweeping.Wait()
	defer close(rounds)
	for ctx.Err() == nil {
		start := time.Now()
		looked := k.once(ctx, rounds)
		backoff.Sleep(ctx, untilNextLook(k.cfg.Stream.CheckInterval, time.Since(start), looked))
	}
}

// slowestLooks bounds the wait after a slow look. The look may have been slow because a request had to be sent again.
const slowestLooks = 30 * time.Second

// untilNextLook returns how long to wait after a look. If a look takes long, as on a stream with very many subjects,
// looks are less frequent. A look that failed only waited for answers.
func untilNextLook(interval, took time.Duration, looked bool) time.Duration {
	if !looked {
		return interval
	}
	return max(interval, min(10*took, slowestLooks))
}

// once looks at the stream and hands the result to the sweeper, unless that is busy with an earlier round. It reports
// whether the look succeeded.
func (k *keeper) once(ctx context.Context, rounds chan<- round) bool {
	if !k.js.Conn().IsConnected() {
		return false
	}
	r, err := k.look(ctx)
	if errors.Is(err, jetstream.ErrStreamNotFound) || ctx.Err() != nil { // the loops create it
		return false
	}
	if k.changed("keeper", err) && err != nil {
		k.log.Warn("the stream cannot be checked", "stream", k.cfg.Stream.Name, "err", err)
	}
	if err != nil {
		return false
	}
	k.metrics.checked()
	select {
	case rounds <- r:
	default:
	}
	return true
}

// changed reports whether err is another than last time for the same topic.
func (k *keeper) changed(about string, err error) bool {
	was, said := k.warned[about], text(err)
	k.warned[about] = said
	return was != said
}

// look reads stream and consumers from the server, checks their settings, and sets the metrics.
func (k *keeper) look(ctx context.Context) (round, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second,
		errors.New("reading the stream and its consumers timed out after 30s"))
	defer cancel()
	v, err := ReadView(ctx, k.js, k.cfg.Stream.Name)
	if err != nil {
		return round{}, errors.Join(err, context.Cause(ctx))
	}
	advisories, err := k.advisories(ctx)
	if err != nil {
		return round{}, err
	}
	k.check(ctx, v, advisories)
	r := round{view: v, owners: map[string]owner{}}
	for subject := range v.State.Subjects {
		r.owners[subject] = k.owners.of(v, subject)
	}
	k.owners.forget(v)
	return r, k.measure(ctx, r)
}

// check checks the settings of streams and consumers. Nothing is pulled until they are good. Advisories is nil if the
// stream of advisories does not exist yet.
func (k *keeper) check(ctx context.Context, v *View, advisories *jetstream.StreamConfig) {
	errs := []error{k.cfg.checkStream(v.Config), k.checkConsumers(ctx, v)}
	if advisories != nil {
		errs = append(errs, checkSettings(*advisories, advisorySettings))
	}
	err := errors.Join(errs...)
	if k.settings.set(err) {
		if err != nil {
			k.log.Error("pulling stops: settings would lose events", "err", err)
		} else {
			k.log.Info("the settings of stream and consumers lose no event")
		}
	}
	if err != nil {
		k.gate.check(ctx) // in each round, because the last check may have timed out
	}
	for _, w := range weaknesses(v.Config) {
		if k.changed(w, errors.New(w)) {
			k.log.Warn("the stream is weaker than a new one would be", "stream", v.Config.Name, "setting", w)
		}
	}
	for _, name := range v.Missing {
		if k.changed("missing "+name, errors.New(name)) {
			k.log.Warn("the server does not know the state of a consumer", "consumer", name)
		}
	}
}

// advisories returns the settings of the stream of advisories, or nil if it does not exist yet.
func (k *keeper) advisories(ctx context.Context) (*jetstream.StreamConfig, error) {
	stream, err := k.js.Stream(ctx, AdvisoryStream(k.cfg.Stream.Name))
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the settings of stream %s: %w", AdvisoryStream(k.cfg.Stream.Name), err)
	}
	return &stream.CachedInfo().Config, nil
}

// checkConsumers checks the consumers of this worker's models. It restores the settings that the server allows to
// change.
func (k *keeper) checkConsumers(ctx context.Context, v *View) error {
	var errs []error
	for _, model := range k.cfg.Models {
		c, ok := v.Consumers[Durable(model)]
		if !ok {
			continue // its loop creates it
		}
		err := checkConsumer(c.Config, schema.SubjectGeneration(model))
		if err == nil {
			continue
		}
		if _, restored := k.model(model).open(ctx); restored != nil {
			errs = append(errs, fmt.Errorf("%w (delete the consumer, and the worker creates it again: %w)", err, restored))
			continue
		}
		k.log.Warn("the settings of a consumer were changed, and are restored", "err", err)
	}
	return errors.Join(errs...)
}

// measure sets the metrics of one look.
func (k *keeper) measure(ctx context.Context, r round) error {
	v := r.view
	k.metrics.stream(v)
	var errs []error
	models := map[string]bool{}
	for name, c := range v.Consumers {
		model, ok := strings.CutPrefix(name, durablePrefix)
		if !ok || !modelname.Valid(model) {
			continue
		}
		models[model] = true
		subject := schema.SubjectGeneration(model)
		ownership := k.owners.of(v, subject).Ownership
		oldest, err := k.oldest(ctx, v, c, subject)
		errs = append(errs, err)
		orphans := 0
		if ownership == Orphaned {
			orphans, err = k.orphans(ctx, v, c, subject)
			errs = append(errs, err)
		}
		k.metrics.consumer(model, c, oldest, orphans)
		if k.cfg.Backlog != nil && err == nil {
			k.cfg.Backlog(model, Backlog{
				Events: int(min(c.NumPending, 1<<31)) + c.NumAckPending, //nolint:gosec // bounded
				Oldest: oldest, MaxAge: v.Config.MaxAge,
			})
		}
		k.report(model, c, ownership, orphans)
	}
	k.metrics.forget(models)
	return errors.Join(errs...)
}

// oldest returns the age of the oldest message of a consumer that has no verdict yet.
func (k *keeper) oldest(ctx context.Context, v *View, c jetstream.ConsumerInfo, subject string) (time.Duration, error) {
	if c.NumPending == 0 && c.NumAckPending == 0 {
		return 0, nil
	}
	m, err := ReadNext(ctx, k.js, k.cfg.Stream.Name, max(c.AckFloor.Stream+1, v.State.FirstSeq), subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil // it was settled in between
	}
	if err != nil {
		return 0, err
	}
	return max(v.Time.Sub(m.Time), 0), nil
}

// orphans returns how many events of an orphaned consumer have no verdict.
func (k *keeper) orphans(ctx context.Context, v *View, c jetstream.ConsumerInfo, subject string) (int, error) {
	n := int(min(c.NumPending, 1<<31)) + c.NumAckPending //nolint:gosec // bounded
	if !takes(c.Config, subject) {
		n = int(min(v.State.Subjects[subject], 1<<31)) //nolint:gosec // bounded
		c.AckFloor.Stream = v.State.FirstSeq - 1
	}
	if n == 0 || k.cfg.Ledger == nil {
		return n, nil
	}
	dead, err := k.cfg.Ledger.Orphans(ctx, k.cfg.Stream.Name, subject, c.AckFloor.Stream)
	return max(n-dead, 0), err
}

// report logs when events of a model become orphaned or its consumer is paused, and when that ends.
func (k *keeper) report(model string, c jetstream.ConsumerInfo, ownership Ownership, orphans int) {
	var err error
	if ownership == Orphaned && orphans > 0 {
		err = errors.New("nobody pulls from the consumer " + c.Name)
	}
	switch changed := k.changed("orphan "+model, err); {
	case changed && err != nil:
		k.log.Error("events are orphaned: nobody pulls them", "model", model, "consumer", c.Name,
			"events", orphans, "dead_letters_after", k.cfg.OrphanGrace)
	case changed:
		k.log.Info("events are no longer orphaned", "model", model)
	}
	err = nil
	if c.Paused {
		err = errors.New("paused")
	}
	switch changed := k.changed("pause "+model, err); {
	case changed && err != nil:
		k.log.Error("a consumer is paused: its events wait", "model", model, "consumer", c.Name,
			"remaining", c.PauseRemaining)
	case changed:
		k.log.Info("a consumer is no longer paused", "model", model)
	}
}

// subjects returns the subjects of the round in alphabetical order.
func (r round) subjects() []string {
	list := make([]string, 0, len(r.owners))
	for s := range r.owners {
		list = append(list, s)
	}
	slices.Sort(list)
	return list
}

// Package canary checks that alerts still fire. It publishes events of under-trained classes, and raises an alert if no
// alert fires on one of them in time.
package canary

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Source is the CloudEvents source of canaries.
const Source = schema.CanarySource

var (
	// ErrNoClass is returned for an ensemble that has no under-trained class.
	ErrNoClass = errors.New("the ensemble has no class that is known to be under-trained")
	// ErrMissed is returned by [Watchdog.Once] if no alert fired on a canary in time.
	ErrMissed = errors.New("a canary was missed")
)

// Classes returns the indices of the under-trained classes. These are the classes with the fewest training images, on
// average over the components, if that is at most a hundredth of what the best-trained class has. The error is
// ErrNoClass if no class is that rare.
func Classes(m *ensemble.Manifest) ([]int, error) {
	means := make([]float64, len(m.Classes))
	for i, c := range m.Classes {
		for _, n := range c.Images {
			means[i] += float64(n) / float64(len(c.Images))
		}
	}
	least, most := slices.Min(means), slices.Max(means)
	if least*100 > most {
		return nil, fmt.Errorf("%s: the rarest class has %g training images on average, the most frequent %g: %w",
			m.Name, least, most, ErrNoClass)
	}
	var rare []int
	for i, n := range means {
		if n == least {
			rare = append(rare, i)
		}
	}
	return rare, nil
}

// Store is the part of [postgres.Store] that keeps canaries.
type Store interface {
	AddCanary(ctx context.Context, c postgres.Canary) error
	OpenCanaries(ctx context.Context) ([]postgres.Canary, error)
	CloseCanary(ctx context.Context, source, id string, outcome postgres.CanaryOutcome) (bool, error)
	RaiseAlert(ctx context.Context, a schema.Alert) (bool, error)
}

// Config is the configuration of a [Watchdog].
type Config struct {
	Every      time.Duration // between two canaries of one model. Defaults to 5 minutes
	Deadline   time.Duration // by when an alert must have fired. Defaults to 1 minute
	Registerer prometheus.Registerer
	Log        *slog.Logger // Defaults to slog.Default()
}

// Watchdog publishes canaries and decides whether they were caught. A canary passes everything that an event passes:
// stream, scoring, thresholds, tables.
type Watchdog struct {
	cfg     Config
	store   Store
	publish func(context.Context, schema.Event) error
	order   []string // models
	models  map[string]model
	metrics *metrics
}

// model is an ensemble with its under-trained classes.
type model struct {
	*ensemble.Manifest
	rare []int
}

// New returns a watchdog for the models of the ensembles. Publish must store an event in the stream. The error is
// ErrNoClass if an ensemble has no class that is rare enough.
func New(store Store, publish func(context.Context, schema.Event) error, ensembles []*ensemble.Manifest,
	c Config,
) (*Watchdog, error) {
	c.Every, c.Deadline = cmp.Or(c.Every, 5*time.Minute), cmp.Or(c.Deadline, time.Minute)
	c.Log = cmp.Or(c.Log, slog.Default())
	if c.Every <= 0 || c.Deadline <= 0 {
		return nil, fmt.Errorf("canary: Every is %s and Deadline is %s, both must be positive", c.Every, c.Deadline)
	}
	w := &Watchdog{cfg: c, store: store, publish: publish, models: map[string]model{}}
	for _, m := range ensembles {
		rare, err := Classes(m)
		if err != nil {
			return nil, err
		}
		w.models[m.Name] = model{m, rare}
		w.order = append(w.order, m.Name)
	}
	w.metrics = newMetrics(c.Registerer, w.order)
	return w, nil
}

// Run publishes a canary of each model at once and then at the interval, and decides them, until ctx ends. Errors are
// logged. A canary that cannot be published is missed when its time is over.
func (w *Watchdog) Run(ctx context.Context) error {
	look := time.NewTicker(min(w.cfg.Deadline/10+time.Millisecond, time.Second))
	defer look.Stop()
	send := time.NewTicker(w.cfg.Every)
	defer send.Stop()
	w.sendAll(ctx)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-send.C:
			w.sendAll(ctx)
		case <-look.C:
			if _, err := w.Decide(ctx); err != nil && ctx.Err() == nil {
				w.cfg.Log.Warn("canaries cannot be decided", "err", err)
			}
		}
	}
}

func (w *Watchdog) sendAll(ctx context.Context) {
	for _, name := range w.order {
		if c, err := w.Send(ctx, name); err != nil && ctx.Err() == nil {
			w.cfg.Log.Warn("canary was not published", "model", name, "id", c.EventID, "err", err)
		}
	}
}

// Once publishes one canary of each model and waits until each is decided. It calls report with each canary when it is
// published, and again with its outcome. The error is ErrMissed if no alert fired on one of them in time.
func (w *Watchdog) Once(ctx context.Context, report func(postgres.Canary)) error {
	var mine []string
	for _, name := range w.order {
		c, err := w.Send(ctx, name)
		if err != nil {
			return err
		}
		mine = append(mine, c.EventID)
		report(c)
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var missed error
	for len(mine) > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		closed, err := w.Decide(ctx)
		if err != nil {
			return err
		}
		for _, c := range closed {
			i := slices.Index(mine, c.EventID)
			if i < 0 {
				continue
			}
			mine = slices.Delete(mine, i, i+1)
			report(c)
			if c.Outcome == postgres.CanaryMissed {
				missed = ErrMissed
			}
		}
	}
	return missed
}

// Send records and publishes one canary of a model. Its class and seed follow from its new id.
func (w *Watchdog) Send(ctx context.Context, name string) (postgres.Canary, error) {
	m, ok := w.models[name]
	if !ok {
		return postgres.Canary{}, fmt.Errorf("canary: unknown model %q", name)
	}
	id := uuid.Must(uuid.NewV7()).String()
	sum := sha256.Sum256([]byte("canary\n" + id))
	class := m.rare[binary.BigEndian.Uint32(sum[:4])%uint32(len(m.rare))]
	now := time.Now().UTC().Truncate(time.Microsecond)
	c := postgres.Canary{
		Source: Source, EventID: id, Model: name, ClassIndex: class, ClassLabel: m.Classes[class].Label,
		PublishedAt: now, DueAt: now.Add(w.cfg.Deadline),
	}
	if err := w.store.AddCanary(ctx, c); err != nil {
		return c, err
	}
	return c, w.publish(ctx, schema.Event{Source: c.Source, ID: c.EventID, Time: now, Data: schema.Generation{
		Model: name, Class: schema.ClassIndex(class), Seed: binary.BigEndian.Uint64(sum[8:16]),
		Labels: map[string]string{schema.LabelCanary: "true"},
	}})
}

// Decide closes the canaries that are caught or whose time is over, and returns those that it closed. It raises the
// alert on a missed canary first, so that no alert is lost if the process ends in between.
func (w *Watchdog) Decide(ctx context.Context) ([]postgres.Canary, error) {
	open, err := w.store.OpenCanaries(ctx)
	if err != nil {
		return nil, err
	}
	var closed []postgres.Canary
	for _, c := range open {
		if _, ours := w.models[c.Model]; !ours {
			continue
		}
		if c.Outcome == postgres.CanaryMissed {
			if _, err := w.store.RaiseAlert(ctx, missed(c)); err != nil {
				return closed, err
			}
		}
		first, err := w.store.CloseCanary(ctx, c.Source, c.EventID, c.Outcome)
		if err != nil {
			return closed, err
		}
		if !first {
			continue
		}
		closed = append(closed, c)
		w.metrics.closed(c)
		if c.Outcome == postgres.CanaryCaught {
			w.cfg.Log.Debug("canary was caught", "model", c.Model, "class", c.ClassLabel, "id", c.EventID)
			continue
		}
		w.cfg.Log.Error("canary was missed", "model", c.Model, "class", c.ClassLabel, "id", c.EventID,
			"deadline", c.DueAt.Sub(c.PublishedAt), "why", why(c))
	}
	return closed, nil
}

// missed returns the alert on a missed canary.
func missed(c postgres.Canary) schema.Alert {
	return schema.Alert{
		ID:   schema.ID(string(schema.AlertCanaryMissed), c.Source, c.EventID),
		Kind: schema.AlertCanaryMissed, Source: c.Source, EventID: c.EventID, EventTime: c.PublishedAt.UTC(), Model: c.Model,
		ClassIndex: c.ClassIndex, ClassLabel: c.ClassLabel, Labels: map[string]string{schema.LabelCanary: "true"},
		Severity: schema.SeverityCritical, Reason: schema.Reason(schema.AlertCanaryMissed),
		FiredAt: time.Now().UTC().Truncate(time.Microsecond),
		Detail: fmt.Sprintf("no alert fired on a canary of the under-trained class %q within %s: %s",
			c.ClassLabel, c.DueAt.Sub(c.PublishedAt), why(c)),
	}
}

// why says how far a missed canary came.
func why(c postgres.Canary) string {
	switch c.Verdict {
	case schema.OutcomeScore:
		return "it was scored, but no threshold fired"
	case schema.OutcomeSkip:
		return "it was skipped"
	case schema.OutcomeDeadLetter:
		return "it became a dead letter"
	default:
		return "it was not scored"
	}
}

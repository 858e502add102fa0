package review

import (
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

// CanarySource is the CloudEvents source of canaries.
const CanarySource = "/decuwatch/canary"

// ErrNoCanary is returned for an ensemble none of whose classes is known to be under-trained.
var ErrNoCanary = errors.New("the ensemble has no class that is known to be under-trained")

// CanaryClasses returns the indices of the classes that the ensemble is known to know too little: those whose components saw the
// fewest training images on average, and at most a hundredth of what the best-trained class got. The error is ErrNoCanary where no
// class is that rare.
func CanaryClasses(m *ensemble.Manifest) ([]int, error) {
	means := make([]float64, len(m.Classes))
	for i, c := range m.Classes {
		for _, n := range c.Images {
			means[i] += float64(n) / float64(len(c.Images))
		}
	}
	least, most := slices.Min(means), slices.Max(means)
	if least*100 > most {
		return nil, fmt.Errorf("%s: the rarest class has %g training images on average, the most frequent %g: %w", m.Name, least, most, ErrNoCanary)
	}
	var rare []int
	for i, n := range means {
		if n == least {
			rare = append(rare, i)
		}
	}
	return rare, nil
}

// Canaries is where canaries are kept: a *postgres.Store.
type Canaries interface {
	AddCanary(ctx context.Context, c postgres.Canary) error
	OpenCanaries(ctx context.Context) ([]postgres.Canary, error)
	CloseCanary(ctx context.Context, source, id string, outcome postgres.CanaryOutcome) (bool, error)
	RaiseAlert(ctx context.Context, a schema.Alert) (bool, error)
}

// CanaryConfig is the configuration of a Canary.
type CanaryConfig struct {
	Every      time.Duration // between two canaries of one model. Defaults to 5 minutes
	Deadline   time.Duration // by when an alert must have fired. Defaults to 1 minute
	Registerer prometheus.Registerer
	Log        *slog.Logger // Defaults to slog.Default()
}

// WithDefaults returns the configuration with every field that is not set at its default.
func (c CanaryConfig) WithDefaults() CanaryConfig {
	if c.Every == 0 {
		c.Every = 5 * time.Minute
	}
	if c.Deadline == 0 {
		c.Deadline = time.Minute
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// Canary publishes events of classes that an ensemble is known to know too little, and raises an alert where none fires on them. It
// sees the whole way of an event: publishing, stream, scoring, thresholds, tables.
type Canary struct {
	config  CanaryConfig
	store   Canaries
	publish func(context.Context, schema.Event) error
	rare    map[string][]int // classes by model
	models  map[string]*ensemble.Manifest
	decided *prometheus.CounterVec
	last    *prometheus.GaugeVec
}

// NewCanary returns a canary for the models of the ensembles. Publish stores an event in the stream. It fails where an ensemble has no
// class that is rare enough (ErrNoCanary), a time is not positive, or the metrics are registered already.
func NewCanary(store Canaries, publish func(context.Context, schema.Event) error, ensembles []*ensemble.Manifest, c CanaryConfig) (*Canary, error) {
	c = c.WithDefaults()
	if c.Every <= 0 || c.Deadline <= 0 {
		return nil, errors.New("review: Every and Deadline of the canary must be positive")
	}
	k := &Canary{
		config: c, store: store, publish: publish, rare: map[string][]int{}, models: map[string]*ensemble.Manifest{},
		decided: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decuwatch_canaries_total", Help: "Canaries by outcome: caught by an alert in time, or missed.",
		}, []string{"model", "outcome"}),
		last: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_canary_last_caught_timestamp_seconds", Help: "When a canary was last found to be caught; 0 before the first.",
		}, []string{"model"}),
	}
	for _, m := range ensembles {
		rare, err := CanaryClasses(m)
		if err != nil {
			return nil, err
		}
		k.rare[m.Name], k.models[m.Name] = rare, m
		k.decided.WithLabelValues(m.Name, string(postgres.CanaryCaught))
		k.decided.WithLabelValues(m.Name, string(postgres.CanaryMissed))
		k.last.WithLabelValues(m.Name)
	}
	return k, register(c.Registerer, k.decided, k.last)
}

// Run publishes a canary of each model at once and then at the interval, and decides those whose time is over, until ctx ends. What
// fails is logged; a canary that cannot be published is missed when its time is over.
func (k *Canary) Run(ctx context.Context) error {
	look := time.NewTicker(min(k.config.Deadline/10+time.Millisecond, time.Second))
	defer look.Stop()
	send := time.NewTicker(k.config.Every)
	defer send.Stop()
	k.sendAll(ctx)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-send.C:
			k.sendAll(ctx)
		case <-look.C:
			if _, err := k.Decide(ctx); err != nil && ctx.Err() == nil {
				k.config.Log.Warn("canaries cannot be decided", "err", err)
			}
		}
	}
}

func (k *Canary) sendAll(ctx context.Context) {
	for model := range k.rare {
		if c, err := k.Send(ctx, model); err != nil && ctx.Err() == nil {
			k.config.Log.Warn("canary was not published", "model", model, "id", c.EventID, "err", err)
		}
	}
}

// Send records and publishes one canary of a model. The class and the seed follow from its new id.
func (k *Canary) Send(ctx context.Context, model string) (postgres.Canary, error) {
	id := uuid.Must(uuid.NewV7()).String()
	sum := sha256.Sum256([]byte("canary\n" + id))
	rare := k.rare[model]
	if len(rare) == 0 {
		return postgres.Canary{}, fmt.Errorf("canary: there is no model %s", model)
	}
	class := rare[binary.BigEndian.Uint32(sum[:4])%uint32(len(rare))]
	label := k.models[model].Classes[class].Label
	now := time.Now().UTC().Truncate(time.Microsecond)
	c := postgres.Canary{
		Source: CanarySource, EventID: id, Model: model, ClassIndex: class, ClassLabel: label, PublishedAt: now, DueAt: now.Add(k.config.Deadline),
	}
	if err := k.store.AddCanary(ctx, c); err != nil {
		return c, err
	}
	return c, k.publish(ctx, schema.Event{
		Source: c.Source, ID: c.EventID, Time: now,
		Data: schema.Generation{
			Model: model, Class: schema.ClassIndex(class), Seed: binary.BigEndian.Uint64(sum[8:16]), Labels: map[string]string{schema.LabelCanary: "true"},
		},
	})
}

// Decide closes the canaries that are caught or whose time is over and returns those that it closed. A missed one raises an alert
// first, so that none is lost should the process end in between.
func (k *Canary) Decide(ctx context.Context) ([]postgres.Canary, error) {
	open, err := k.store.OpenCanaries(ctx)
	if err != nil {
		return nil, err
	}
	var closed []postgres.Canary
	for _, c := range open {
		if k.models[c.Model] == nil {
			continue // another process's
		}
		if c.Outcome == postgres.CanaryMissed {
			if _, err := k.store.RaiseAlert(ctx, k.missed(c)); err != nil {
				return closed, err
			}
		}
		first, err := k.store.CloseCanary(ctx, c.Source, c.EventID, c.Outcome)
		if err != nil {
			return closed, err
		}
		if !first {
			continue
		}
		closed = append(closed, c)
		k.decided.WithLabelValues(c.Model, string(c.Outcome)).Inc()
		if c.Outcome == postgres.CanaryCaught {
			k.last.WithLabelValues(c.Model).SetToCurrentTime()
			k.config.Log.Debug("canary was caught", "model", c.Model, "class", c.ClassLabel, "id", c.EventID)
			continue
		}
		k.config.Log.Error("canary was missed", "model", c.Model, "class", c.ClassLabel, "id", c.EventID, "deadline", c.DueAt.Sub(c.PublishedAt), "why", why(c))
	}
	return closed, nil
}

// missed returns the alert on a missed canary.
func (k *Canary) missed(c postgres.Canary) schema.Alert {
	return schema.Alert{
		ID: schema.ID(string(schema.AlertCanaryMissed), c.Source, c.EventID), Kind: schema.AlertCanaryMissed, Source: c.Source, EventID: c.EventID, EventTime: c.PublishedAt.UTC(), Model: c.Model,
		ClassIndex: c.ClassIndex, ClassLabel: c.ClassLabel, Labels: map[string]string{schema.LabelCanary: "true"}, Severity: schema.SeverityCritical,
		Reason: schema.Reason(schema.AlertCanaryMissed), FiredAt: time.Now().UTC().Truncate(time.Microsecond),
		Detail: fmt.Sprintf("no alert fired on a canary of the under-trained class %q within %s: %s", c.ClassLabel, c.DueAt.Sub(c.PublishedAt), why(c)),
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
	}
	return "it was not scored"
}

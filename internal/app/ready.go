package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

// readiness exercises what the next verdict needs. Each check is one method.
type readiness struct {
	worker    string // id of this process in the table of workers and on the subject of its probes
	engines   map[string]*scoring.Engine
	shadows   map[string]*scoring.Engine
	nc        *nats.Conn
	js        jetstream.JetStream
	events    string // name of the stream of events
	alerts    *alerts.StreamSink
	store     *postgres.Store
	tolerance time.Duration // between two clocks
	offset    *prometheus.GaugeVec
	log       *slog.Logger

	mu     sync.Mutex
	others error // names workers that score a model with another ensemble
}

// newReadiness returns a readiness whose other fields the caller sets.
func newReadiness(reg prometheus.Registerer, tolerance time.Duration, log *slog.Logger) *readiness {
	return &readiness{
		worker: uuid.NewString(), tolerance: tolerance, log: log,
		offset: promauto.With(reg).NewGaugeVec(prometheus.GaugeOpts{
			Name: "decuwatch_clock_offset_seconds",
			Help: "How far the worker's clock is ahead of another's: postgres, jetstream.",
		}, []string{"against"}),
	}
}

// watch adds the checks to h.
func (r *readiness) watch(h *health) {
	h.set(partNATS, r.publish)
	h.set(partPostgres, r.write)
	h.set(partEnsemble, r.score)
	h.set(partClock, r.clocks)
	h.set(partWorkers, func(context.Context) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.others
	})
}

// publish stores a message in JetStream.
func (r *readiness) publish(ctx context.Context) error {
	if !r.nc.IsConnected() {
		return errors.New("not connected")
	}
	return r.alerts.Probe(ctx, r.worker)
}

// score runs each session that had no good run a moment ago.
func (r *readiness) score(ctx context.Context) error {
	for name, engine := range r.engines {
		if err := engine.Check(ctx, recent); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

const (
	workerSeen  = 4 * checkEvery // how long a silent worker counts as running
	workerGrace = time.Minute    // of a rollout, in which the newer worker is ready, so that the older one is replaced
)

// write commits the worker's heartbeat, and notes the workers that score the same models with another ensemble, unless
// one of the two is marked as a shadow of the other.
func (r *readiness) write(ctx context.Context) error {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	var models []postgres.WorkerModel
	for name, e := range r.engines {
		m := postgres.WorkerModel{
			Model: name, EnsembleDigest: e.Ensemble().Digest, Settings: e.Profile().Settings(),
		}
		if shadow := r.shadows[name]; shadow != nil {
			m.Shadows = []string{shadow.Ensemble().Digest}
		}
		models = append(models, m)
	}
	others, up, err := r.store.Beat(ctx, r.worker, host, models, workerSeen)
	if err != nil {
		return err
	}
	var conflict, noted error
	for _, o := range others {
		mine := r.engines[o.Model]
		err := fmt.Errorf("model %s is scored here with ensemble %s (%s), and on %s since %s with ensemble %s (%s); "+
			"neither is a shadow of the other (scoring.shadows)",
			o.Model, mine.Ensemble().Digest, mine.Profile().Settings(),
			o.Host, o.StartedAt.UTC().Format(time.RFC3339), o.EnsembleDigest, o.Settings)
		noted = errors.Join(noted, err)
		if !o.Older || up > workerGrace {
			conflict = errors.Join(conflict, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if noted != nil && (r.others == nil) && conflict == nil {
		r.log.Warn("two ensembles under one name", "err", noted)
	}
	r.others = conflict
	return nil
}

// leave takes this worker out of the table of workers.
func (r *readiness) leave() error {
	ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
	defer cancel()
	return r.store.Leave(ctx, r.worker)
}

// paused returns an error that names the consumers that an operator has paused.
func (r *readiness) paused(ctx context.Context, models []string) error {
	if !r.nc.IsConnected() {
		return nil // the loops report that
	}
	var errs []error
	for _, model := range models {
		consumer, err := r.js.Consumer(ctx, r.events, consumers.Durable(model))
		if err != nil {
			errs = append(errs, fmt.Errorf("look at consumer %s: %w", consumers.Durable(model), err))
		} else if info := consumer.CachedInfo(); info.Paused {
			errs = append(errs, fmt.Errorf("consumer %s is paused by an operator for %s more",
				info.Name, info.PauseRemaining.Round(time.Second)))
		}
	}
	return errors.Join(errs...)
}

// clocks compares the worker's clock with those of Postgres and JetStream.
func (r *readiness) clocks(ctx context.Context) error {
	errs := []error{r.compare(ctx, "postgres", r.store.Now)}
	if r.nc.IsConnected() { // else the part nats reports it
		errs = append(errs, r.compare(ctx, "jetstream", func(ctx context.Context) (time.Time, error) {
			stream, err := r.js.Stream(ctx, r.events)
			if errors.Is(err, jetstream.ErrStreamNotFound) { // it is not created yet
				stream, err = r.js.Stream(ctx, r.alerts.Stream())
			}
			if err != nil {
				return time.Time{}, err
			}
			return stream.CachedInfo().TimeStamp, nil
		}))
	}
	return errors.Join(errs...)
}

// compare asks another for its time. The answer was given at some moment of the round trip, which bounds the error.
func (r *readiness) compare(ctx context.Context, name string, ask func(context.Context) (time.Time, error)) error {
	asked := time.Now()
	theirs, err := ask(ctx)
	if err != nil {
		return fmt.Errorf("the clock of %s is unknown: %w", name, err)
	}
	trip := time.Since(asked)
	offset := asked.Add(trip / 2).Round(0).Sub(theirs)
	r.offset.WithLabelValues(name).Set(offset.Seconds())
	direction := "ahead of"
	if offset < 0 {
		offset, direction = -offset, "behind"
	}
	if off := offset - trip/2; off > r.tolerance {
		return fmt.Errorf("this worker's clock is %s %s %s's, at most %s is allowed",
			off.Round(time.Millisecond), direction, name, r.tolerance)
	}
	return nil
}

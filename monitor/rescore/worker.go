package rescore

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// Target is an ensemble that this process scores with.
type Target struct {
	Model  monitor.Model
	Series schema.Series // of its fixed profile
	Shadow bool          // it gets the events that another ensemble has scored
	Share  float64       // of these events, 0 to 1; of a shadow only

	// Busy says that live work needs the device, if that is another engine's. While it does, the target gets BusyShare of
	// the time, for one event after the other. If it is nil, the engine itself puts live work first.
	Busy      func() bool
	BusyShare float64
}

// Store holds scores and failures: a *postgres.Store.
type Store interface {
	RescoreSource(ctx context.Context, e postgres.StoredEvent, of schema.Series) (*schema.Score, bool, error)
	RecordRescore(ctx context.Context, r schema.Rescore) (first bool, err error)
	FailRescore(ctx context.Context, f postgres.RescoreFailure) error
	FeedShadow(ctx context.Context, model, digest string, limit int, give func([]postgres.StoredEvent) error,
	) (behind time.Duration, more bool, err error)
}

// Worker serves the queue for its targets, and feeds it the events of its shadows. Several processes may run one: an
// event gets one score of each ensemble.
type Worker struct {
	queue   *queue
	store   Store
	decider monitor.Decider
	targets []Target
	metrics *metrics
	log     *slog.Logger
}

// NewWorker returns a worker. The decider is asked for the alerts of re-scores that may raise some.
func NewWorker(js jetstream.JetStream, store Store, decider monitor.Decider, targets []Target, c Config,
	reg prometheus.Registerer, log *slog.Logger,
) (*Worker, error) {
	c = settings.WithDefaults(c)
	if err := c.Check(); err != nil {
		return nil, err
	}
	return &Worker{
		queue: newQueue(js, c), store: store, decider: decider, targets: targets, metrics: newMetrics(reg, targets),
		log: cmp.Or(log, slog.Default()),
	}, nil
}

// Run works until ctx ends, and returns nil. An attempt that is under way then goes to another worker.
func (w *Worker) Run(ctx context.Context) error {
	var group errgroup.Group
	for _, t := range w.targets {
		p := &pacer{busy: t.Busy, share: t.BusyShare}
		for range w.queue.config.Workers {
			group.Go(func() error { w.serve(ctx, t, p); return nil })
		}
		if t.Shadow {
			group.Go(func() error { w.feed(ctx, t); return nil })
		}
	}
	return group.Wait()
}

// serve takes one job after the other.
func (w *Worker) serve(ctx context.Context, t Target, p *pacer) {
	const expiry = 20 * time.Second // of one request for a job
	retry := backoff.Backoff{Min: 200 * time.Millisecond, Max: 10 * time.Second}
	var consumer jetstream.Consumer
	for ctx.Err() == nil {
		var err error
		if consumer == nil {
			consumer, err = w.queue.consumer(ctx, t.Series)
		}
		if err == nil {
			err = w.take(ctx, t, p, consumer, expiry)
		}
		if err == nil {
			retry.Failures = 0
			continue
		}
		if ctx.Err() == nil {
			consumer = nil // somebody may have removed it
			if retry.Failures > 2 {
				w.log.Warn("re-scores are not available", "model", t.Series.Model, "err", err)
			}
			retry.Wait(ctx)
		}
	}
}

// take waits for a job and does it. It returns an error if the queue does not answer.
func (w *Worker) take(ctx context.Context, t Target, p *pacer, consumer jetstream.Consumer, expiry time.Duration,
) error {
	wait, cancel := context.WithTimeout(ctx, expiry)
	defer cancel()
	batch, err := consumer.Fetch(1, jetstream.FetchContext(wait))
	if err != nil {
		return err
	}
	for msg := range batch.Messages() {
		end, start := p.begin(ctx), time.Now()
		w.handle(ctx, t, msg)
		end(time.Since(start))
	}
	if err := batch.Error(); err != nil && wait.Err() == nil {
		return err
	}
	return nil
}

// handle brings a job to its end: it is acknowledged when its score, or why it has none, is committed.
func (w *Worker) handle(ctx context.Context, t Target, msg jetstream.Msg) {
	defer w.beat(msg)()
	var job Job
	meta, err := msg.Metadata()
	if err == nil {
		err = json.Unmarshal(msg.Data(), &job)
	}
	if err != nil || job.Run == "" || job.Source == "" || job.ID == "" {
		w.log.Error("a job of the queue is malformed, and is removed", "subject", msg.Subject(), "err", err)
		w.end(ctx, msg)
		return
	}
	outcome, err := w.score(ctx, t, job)
	if err != nil {
		outcome, err = w.fail(ctx, t, job, err, int(min(meta.NumDelivered, 1<<20))) //nolint:gosec // bounded
	}
	w.metrics.done.WithLabelValues(t.Series.Model, string(job.Purpose), outcome).Inc()
	switch {
	case err == nil:
		w.end(ctx, msg)
	case ctx.Err() != nil:
		_ = msg.Nak() // else it goes to another worker after AckWait
	default:
		w.log.Warn("an event was not scored again, it is tried later", "model", t.Series.Model, "source", job.Source,
			"id", job.ID, "err", err)
		tries := int(min(meta.NumDelivered, 64)) //nolint:gosec // bounded
		_ = msg.NakWithDelay(backoff.After(tries, time.Second, time.Minute))
	}
}

// beat keeps a job until the returned function is called, however long it takes.
func (w *Worker) beat(msg jetstream.Msg) (stop func()) {
	done := make(chan struct{})
	go func() {
		tick := time.NewTicker(w.queue.config.AckWait / 3)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_ = msg.InProgress() // else another worker does the job, too
			case <-done:
				return
			}
		}
	}()
	return func() { close(done) }
}

// end removes a job that needs no more work. If that fails, the job is found done when it comes again.
func (w *Worker) end(ctx context.Context, msg jetstream.Msg) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := msg.DoubleAck(ctx); err != nil {
		w.log.Warn("a job that is done was not acknowledged, it comes again", "err", err)
	}
}

// score makes and stores the score of a job.
func (w *Worker) score(ctx context.Context, t Target, job Job) (outcome string, err error) {
	source, known, err := w.store.RescoreSource(ctx, job.event(), t.Series)
	if err != nil {
		return "", err
	}
	if known {
		return outcomeKnown, nil
	}
	score, err := monitor.Rescore(ctx, t.Model, source.Event)
	if err != nil {
		return "", err
	}
	// A share of re-scores is the same for all events, so only the lot of the verdict sets their weights apart.
	score.InclusionProbability = source.InclusionProbability
	r := schema.Rescore{Score: score, Purpose: job.Purpose}
	if job.Alert && job.Purpose == schema.PurposeRescore {
		r.Alerts = w.decider.Decide(*score).Alerts
		for i, a := range r.Alerts { // the event's verdict may have raised the same alert under other settings
			r.Alerts[i].ID = schema.ID("rescore", a.ID, score.Receipt.Settings)
		}
	}
	first, err := w.store.RecordRescore(ctx, r)
	if err != nil || !first {
		return outcomeKnown, err
	}
	return outcomeScored, nil
}

// fail records why a job cannot be done, if another attempt will not help or enough were made. Otherwise it returns the
// job's error.
func (w *Worker) fail(ctx context.Context, t Target, job Job, cause error, tries int) (outcome string, err error) {
	var permanent interface {
		DeadLetterKind() schema.DeadLetterKind
	}
	var invalid *schema.Invalid
	var away interface{ Unavailable() bool }
	kind := ""
	switch {
	case ctx.Err() != nil:
	case errors.As(cause, &permanent):
		kind = string(permanent.DeadLetterKind())
	case errors.Is(cause, postgres.ErrNotFound), errors.As(cause, &invalid):
		kind = failureGone
	case errors.As(cause, &away) && away.Unavailable(): // says nothing about the event
	case tries >= w.queue.config.MaxTries:
		kind = string(schema.KindFailed)
	}
	if kind == "" {
		return outcomeRetried, cause
	}
	err = w.store.FailRescore(ctx, postgres.RescoreFailure{
		Run: job.Run, Event: job.event(), Series: t.Series, Kind: kind, Reason: cause.Error(),
	})
	if err != nil {
		return outcomeRetried, fmt.Errorf("%w, after: %w", err, cause)
	}
	w.log.Warn("an event cannot be scored again", "model", t.Series.Model, "ensemble", t.Series.EnsembleDigest,
		"source", job.Source, "id", job.ID, "kind", kind, "err", cause)
	return outcomeFailed, nil
}

// failureGone is the kind of failure of an event whose live score is gone.
const failureGone = "gone"

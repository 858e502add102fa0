package rescore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// ErrStreamConfig is returned if the stream exists with settings that lose or repeat work. Its text names the setting.
var ErrStreamConfig = errors.New("the stream of re-scores cannot be used")

const (
	subjectPrefix = "decuwatch.rescore."
	// shadowRun stands for the run of everything that a shadow ensemble is given.
	shadowRun = "shadow"

	maxJobs    = 100_000
	maxJobSize = 4 << 10
	duplicates = 2 * time.Minute
)

// Job is one event that is to be scored again.
type Job struct {
	Run     string         `json:"run"`
	Purpose schema.Purpose `json:"purpose"`
	Time    time.Time      `json:"time"` // of the event
	Source  string         `json:"source"`
	ID      string         `json:"id"`
	Alert   bool           `json:"alert,omitempty"` // its score may raise alerts
}

func (j Job) event() postgres.StoredEvent {
	return postgres.StoredEvent{Time: j.Time, Source: j.Source, ID: j.ID}
}

// queue is the stream of jobs. Each ensemble of a model has a subject for each run.
type queue struct {
	js     jetstream.JetStream
	config Config
}

func newQueue(js jetstream.JetStream, c Config) *queue { return &queue{js, settings.WithDefaults(c)} }

func subject(of schema.Series, run string) string {
	return subjectPrefix + of.Model + "." + of.EnsembleDigest + "." + run
}

// ensure returns the stream, which is made if it does not exist. An operator's stream stays as it is.
func (q *queue) ensure(ctx context.Context) (jetstream.Stream, error) {
	stream, err := q.js.Stream(ctx, q.config.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = q.js.CreateStream(ctx, jetstream.StreamConfig{
			Name:        q.config.Stream,
			Description: "Stored events that decuwatch scores again, behind live work",
			Subjects:    []string{subjectPrefix + ">"},
			Storage:     jetstream.FileStorage,
			Retention:   jetstream.WorkQueuePolicy,
			Discard:     jetstream.DiscardNew,
			MaxMsgs:     maxJobs,
			MaxMsgSize:  maxJobSize,
			MaxBytes:    maxJobs * 512,
			Replicas:    q.config.Replicas,
			Duplicates:  duplicates,
			DenyDelete:  true,
		})
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another process was first
			stream, err = q.js.Stream(ctx, q.config.Stream)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ensure stream %s: %w", q.config.Stream, err)
	}
	if r := stream.CachedInfo().Config.Retention; r != jetstream.WorkQueuePolicy {
		return nil, fmt.Errorf("%w: stream %s: retention is %s, must be %s", ErrStreamConfig, q.config.Stream, r,
			jetstream.WorkQueuePolicy)
	}
	return stream, nil
}

// publish stores jobs of a run, and returns when the stream has them all.
func (q *queue) publish(ctx context.Context, of schema.Series, run string, jobs []Job) error {
	// An answer that is lost would be waited for without end. The ids of messages make another try safe.
	ctx, cancel := context.WithTimeoutCause(ctx, publishTimeout,
		fmt.Errorf("publish to stream %s timed out after %s", q.config.Stream, publishTimeout))
	defer cancel()
	futures := make([]jetstream.PubAckFuture, 0, len(jobs))
	for _, j := range jobs {
		body, err := json.Marshal(j)
		if err != nil {
			return err
		}
		id := schema.ID("rescore", run, of.EnsembleDigest, of.Settings, j.Source, j.ID, j.Time.String())
		future, err := q.js.PublishMsgAsync(&nats.Msg{Subject: subject(of, run), Data: body},
			jetstream.WithMsgID(id), jetstream.WithExpectStream(q.config.Stream))
		if err != nil {
			return fmt.Errorf("publish to stream %s: %w", q.config.Stream, err)
		}
		futures = append(futures, future)
	}
	for _, f := range futures {
		select {
		case <-f.Ok():
		case err := <-f.Err():
			return fmt.Errorf("publish to stream %s: %w", q.config.Stream, err)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// publishTimeout bounds how long the stream may take to have some jobs.
const publishTimeout = 10 * time.Second

// waiting returns how many jobs of a run are not done.
func (q *queue) waiting(ctx context.Context, of schema.Series, run string) (int, error) {
	stream, err := q.ensure(ctx)
	if err != nil {
		return 0, err
	}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(subject(of, run)))
	if err != nil {
		return 0, fmt.Errorf("look at stream %s: %w", q.config.Stream, err)
	}
	n := uint64(0)
	for _, count := range info.State.Subjects {
		n += count
	}
	return int(n), nil //nolint:gosec // at most maxJobs
}

// purge removes the jobs of a run that are not done.
func (q *queue) purge(ctx context.Context, of schema.Series, run string) error {
	stream, err := q.ensure(ctx)
	if err == nil {
		err = stream.Purge(ctx, jetstream.WithPurgeSubject(subject(of, run)))
	}
	if err != nil {
		return fmt.Errorf("take back what waits in stream %s: %w", q.config.Stream, err)
	}
	return nil
}

// consumer returns the consumer of the jobs of an ensemble, which all its workers share.
func (q *queue) consumer(ctx context.Context, of schema.Series) (jetstream.Consumer, error) {
	stream, err := q.ensure(ctx)
	if err != nil {
		return nil, err
	}
	consumer, err := stream.CreateOrUpdateConsumer(ctx, jetstream.ConsumerConfig{
		Durable:       "rescore-" + of.EnsembleDigest[:16],
		Description:   "Work of the ensemble " + of.EnsembleDigest + " of " + of.Model,
		FilterSubject: subject(of, "*"),
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       q.config.AckWait,
		MaxAckPending: maxJobs,
	})
	if err != nil {
		return nil, fmt.Errorf("ensure the consumer of stream %s: %w", q.config.Stream, err)
	}
	return consumer, nil
}

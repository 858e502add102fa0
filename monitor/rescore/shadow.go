package rescore

import (
	"context"
	"time"

	"github.com/decuwatch/decuwatch/internal/backoff"
	"github.com/decuwatch/decuwatch/monitor/sampling"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

const (
	feedEvery = time.Second
	feedMost  = 500  // events at a time
	feedAhead = 1000 // events that wait in the queue at most, so that a shadow that is behind leaves room for re-scores
)

// feed gives a shadow the events that got a live score, until ctx ends.
func (w *Worker) feed(ctx context.Context, t Target) {
	retry := backoff.Backoff{Min: feedEvery, Max: 30 * time.Second}
	for ctx.Err() == nil {
		more, err := w.feedOnce(ctx, t)
		switch {
		case err != nil && ctx.Err() == nil:
			w.log.Warn("the shadow ensemble gets no events", "model", t.Series.Model, "err", err)
			retry.Wait(ctx)
			continue
		case !more:
			backoff.Sleep(ctx, feedEvery)
		}
		retry.Failures = 0
	}
}

// feedOnce gives a shadow what is due, as far as the queue has room, and reports whether more may be given at once.
func (w *Worker) feedOnce(ctx context.Context, t Target) (more bool, err error) {
	waiting, err := w.queue.waiting(ctx, t.Series, shadowRun)
	if err != nil {
		return false, err
	}
	if waiting >= feedAhead { // it stays where it is until the next look
		w.metrics.behind.WithLabelValues(t.Series.Model).Add(feedEvery.Seconds())
		return false, nil
	}
	behind, more, err := w.store.FeedShadow(ctx, t.Series.Model, t.Series.EnsembleDigest, feedMost,
		func(events []postgres.StoredEvent) error {
			return w.queue.publish(ctx, t.Series, shadowRun,
				jobs(events, Job{Run: shadowRun, Purpose: schema.PurposeShadow}, "shadow", t.Share))
		})
	if err == nil && behind > 0 {
		w.metrics.behind.WithLabelValues(t.Series.Model).Set(behind.Seconds())
	}
	return more, err
}

// jobs returns the jobs of the events that belong to a share of all.
func jobs(events []postgres.StoredEvent, like Job, domain string, share float64) []Job {
	list := make([]Job, 0, len(events))
	for _, e := range events {
		if drawn(domain, e, share) {
			job := like
			job.Time, job.Source, job.ID = e.Time, e.Source, e.ID
			list = append(list, job)
		}
	}
	return list
}

// drawn reports whether an event belongs to a share of all. Its identity decides, so that every run agrees.
func drawn(domain string, e postgres.StoredEvent, share float64) bool {
	return sampling.Uniform("", domain, e.Source, e.ID) < share
}

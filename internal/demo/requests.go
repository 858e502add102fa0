package demo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
)

// requests publishes requests over all classes, waits for their verdicts, and returns them with the time it took.
func (d *demo) requests(ctx context.Context) ([]schema.Event, time.Duration, error) {
	stream, err := consumers.EnsureStream(ctx, d.js, d.cfg.Stream)
	if err != nil {
		return nil, 0, err
	}
	before := stream.CachedInfo().State.LastSeq
	events := d.events(before)
	began := time.Now()
	bar := terminal.Progress(d.Progress, len(events), "publishing")
	_, _, err = schema.PublishAll(ctx, d.js, events, 64, func() { _ = bar.Add(1) }) // it only draws
	_ = bar.Exit()
	if err != nil {
		return nil, 0, err
	}
	if d.Progress == nil {
		fmt.Fprintf(d.Out, "published  %d requests over %d classes, every one with a seed of its own\n",
			len(events), len(d.ensemble.Classes))
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return nil, 0, err
	}
	if err := d.scored(ctx, before+1, info.State.LastSeq); err != nil {
		return nil, 0, err
	}
	took := time.Since(began)
	if d.Progress == nil {
		fmt.Fprintf(d.Out, "scored     %d requests in %.1f s\n", len(events), took.Seconds())
	}
	return events, took, nil
}

// events returns the requests of a run that starts after the given message of the stream.
func (d *demo) events(before uint64) []schema.Event {
	e := d.ensemble
	tenants := []string{"acme", "globex", "initech"}
	events := make([]schema.Event, d.Requests)
	for i := range events {
		events[i] = schema.NewEvent("/decuwatch/demo", schema.Generation{
			Model: e.Name, Class: schema.ClassLabel(e.Classes[i%len(e.Classes)].Label), Noise: e.Noise,
			Seed: before + uint64(i) + 1, //nolint:gosec // small
			Sampler: &schema.Sampler{
				Name: e.Diffusion.Sampler(), Steps: e.Profile.RequestRisk.Steps,
				GuidanceScale: e.Profile.GuidanceScale, Eta: e.Profile.Eta,
			},
			Labels: map[string]string{"tenant": tenants[i%len(tenants)]},
		})
	}
	return events
}

// sayEvery is the interval of lines about progress if there is no terminal to draw on.
const sayEvery = 5 * time.Second

// scored waits until the messages of the stream from one sequence number to another have their verdicts.
func (d *demo) scored(ctx context.Context, from, to uint64) error {
	late := fmt.Errorf("not every request has its verdict after %s", d.Timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, d.Timeout, late)
	defer cancel()
	bar := terminal.Progress(d.Progress, d.Requests, "scoring")
	defer bar.Exit() //nolint:errcheck // it only draws
	said := time.Now()
	return until(ctx, 100*time.Millisecond, func() (bool, error) {
		verdicts, err := d.store.VerdictsBySequence(ctx, d.cfg.Stream.Name, from, to)
		_ = bar.Set(min(len(verdicts), d.Requests)) // it only draws
		if d.Progress == nil && time.Since(said) >= sayEvery && len(verdicts) < d.Requests {
			said = time.Now()
			d.say("scoring", "%d of %d requests", len(verdicts), d.Requests)
		}
		return len(verdicts) >= d.Requests, err
	})
}

// published waits until every alert has reached the stream.
func (d *demo) published(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("alerts are still in the outbox after 1m"))
	defer cancel()
	return until(ctx, 50*time.Millisecond, func() (bool, error) {
		stats, err := d.store.OutboxStats(ctx)
		return !slices.ContainsFunc(stats, func(s schema.OutboxStats) bool { return s.Pending > 0 }), err
	})
}

// until calls done at the interval until it returns true or an error. The error is the context's cause if ctx ends.
func until(ctx context.Context, every time.Duration, done func() (bool, error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		yes, err := done()
		switch {
		case err != nil:
			return errors.Join(context.Cause(ctx), err)
		case yes:
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

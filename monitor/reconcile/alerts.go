package reconcile

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

func (r *run) compareAlerts(ctx context.Context) error {
	state, err := r.alertStream(ctx)
	if err != nil {
		return err
	}
	var since time.Time
	if state.FirstSeq > 1 {
		since = state.FirstTime // older alerts have left the stream
	}
	// Postgres is read at one moment, and the stream after it: an alert that was sent by then is in the stream.
	alerts, err := r.Store.AlertDeliveries(ctx, since)
	if err != nil {
		return err
	}
	if state, err = r.alertStream(ctx); err != nil {
		return err
	}
	published, err := r.publishedAlerts(ctx, state)
	if err != nil {
		return err
	}
	r.countAlerts(alerts, published)
	return r.findUnknownAlerts(ctx, alerts, published)
}

// publishedAlerts returns the ids of the alerts in the stream.
func (r *run) publishedAlerts(ctx context.Context, state jetstream.StreamState) (map[string]bool, error) {
	published := map[string]bool{}
	err := readAll(ctx, r.JetStream, r.Options.Alerts, state, func(messages []consumers.Stored, _, _ uint64) error {
		for _, m := range messages {
			if a, err := schema.DecodeAlert(m.Payload); err == nil {
				published[a.ID] = true
			}
		}
		return nil
	})
	return published, err
}

// countAlerts counts the alerts of Postgres.
func (r *run) countAlerts(alerts map[string]postgres.AlertDelivery, published map[string]bool) {
	for id, delivery := range alerts {
		r.report.Alerts++
		switch {
		case published[id]:
			r.report.Published++
		case delivery == postgres.AlertHeldBack:
			r.report.HeldBack++
		case delivery == postgres.AlertOwed:
			r.report.OwedAlerts++
		default:
			r.report.LostAlerts++
		}
	}
	if r.report.LostAlerts > 0 {
		r.report.differ("%d alerts are neither in the stream nor owed to it", r.report.LostAlerts)
	}
}

// findUnknownAlerts counts the alerts of the stream that Postgres does not know.
func (r *run) findUnknownAlerts(
	ctx context.Context, alerts map[string]postgres.AlertDelivery, published map[string]bool,
) error {
	for id := range published {
		if _, known := alerts[id]; known {
			continue
		}
		_, err := r.Store.AlertByID(ctx, id)
		if errors.Is(err, postgres.ErrNotFound) {
			r.report.UnknownAlerts++
			r.report.differ("alert %s of the stream is unknown to Postgres", terminal.Printable(id))
		} else if err != nil {
			return err
		}
	}
	return nil
}

// alertStream returns the state of the stream of alerts. The stream is created with the first alert.
func (r *run) alertStream(ctx context.Context) (jetstream.StreamState, error) {
	stream, err := r.JetStream.Stream(ctx, r.Options.Alerts)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return jetstream.StreamState{}, nil
	}
	if err != nil {
		return jetstream.StreamState{}, err
	}
	return stream.CachedInfo().State, nil
}

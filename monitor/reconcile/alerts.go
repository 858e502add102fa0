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
	// The outbox is read before the stream: an alert that has left the outbox is in the stream.
	stats, err := r.Store.OutboxStats(ctx)
	if err != nil {
		return err
	}
	for _, st := range stats {
		if st.Sink == schema.SinkStream {
			r.report.OwedAlerts = int(st.Pending)
		}
	}
	state, err := r.alertStream(ctx)
	if err != nil {
		return err
	}
	var since time.Time
	if state.FirstSeq > 1 {
		since = state.FirstTime // older alerts have left the stream
	}
	sent, err := r.Store.AlertsSent(ctx, since)
	if err != nil {
		return err
	}
	published, err := r.publishedAlerts(ctx, state)
	if err != nil {
		return err
	}
	r.countAlerts(sent, published)
	return r.findUnknownAlerts(ctx, sent, published)
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

// countAlerts counts the alerts of Postgres. Sent says whether each of them goes to the stream.
func (r *run) countAlerts(sent, published map[string]bool) {
	absent := 0
	for id, goes := range sent {
		r.report.Alerts++
		switch {
		case published[id]:
			r.report.Published++
		case !goes:
			r.report.HeldBack++
		default:
			absent++
		}
	}
	if absent > r.report.OwedAlerts {
		r.report.LostAlerts = absent - r.report.OwedAlerts
		r.report.differ("%d alerts are neither in the stream nor owed to it", r.report.LostAlerts)
	}
}

// findUnknownAlerts counts the alerts of the stream that Postgres does not know.
func (r *run) findUnknownAlerts(ctx context.Context, sent, published map[string]bool) error {
	for id := range published {
		if _, known := sent[id]; known {
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

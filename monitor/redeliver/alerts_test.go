package redeliver_test

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/monitor/redeliver"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// An alert that its stream has lost is found, and published again under the same id.
func TestRepublish(t *testing.T) {
	js, err := jetstream.New(natstest.Start(t).Connect())
	if err != nil {
		t.Fatal(err)
	}
	store := pgtest.Open(t, postgres.Config{Sinks: []schema.Sink{schema.SinkStream}})
	sink := alerts.NewStreamSink(js, alerts.StreamConfig{})
	relay, err := alerts.NewRelay(store, alerts.RelayConfig{Logger: slog.New(slog.DiscardHandler)}, sink)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- relay.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	unpublished := func() []string {
		t.Helper()
		ids, err := redeliver.Unpublished(t.Context(), js, store, sink.Stream(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return ids
	}
	inStream := func() bool {
		stream, err := js.Stream(t.Context(), sink.Stream())
		if err != nil {
			return false
		}
		owed, err := store.OutboxStats(t.Context())
		return err == nil && len(owed) == 0 && stream.CachedInfo().State.Msgs == 1
	}

	id := schema.ID("a canary that was missed")
	if _, err := store.RaiseAlert(t.Context(), schema.Alert{
		ID: id, Kind: schema.AlertCanaryMissed, Source: "/tests", EventID: "canary", EventTime: time.Now().UTC(),
		Model: "tiny", ClassIndex: 1, ClassLabel: "Bag", Severity: schema.SeverityCritical,
		Reason: schema.Reason(schema.AlertCanaryMissed), FiredAt: time.Now().UTC(),
	}); err != nil {
		t.Fatal(err)
	}
	natstest.Until(t, "the alert is published", inStream)
	if ids := unpublished(); len(ids) != 0 {
		t.Errorf("published alerts are missing: %q", ids)
	}
	if err := js.DeleteStream(t.Context(), sink.Stream()); err != nil {
		t.Fatal(err)
	}
	if ids := unpublished(); !slices.Equal(ids, []string{id}) {
		t.Fatalf("missing are %q, want %q", ids, id)
	}
	if err := redeliver.Republish(t.Context(), store, []string{id}); err != nil {
		t.Fatal(err)
	}
	natstest.Until(t, "the alert is published again", inStream)
	if ids := unpublished(); len(ids) != 0 {
		t.Errorf("missing after publishing again: %q", ids)
	}
}

package alerts

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/consumers/natstest"
)

// A probe is stored each time, one message for each publisher, and no subscriber of alerts sees it. If an alert could
// not be stored, it fails.
func TestProbe(t *testing.T) {
	server := natstest.Start(t)
	js, ctx := server.JetStream(), t.Context()
	sink := NewStreamSink(js, StreamConfig{MaxBytes: 1 << 20})
	for range 3 {
		for _, id := range []string{"a", "b"} {
			if err := sink.Probe(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
	}
	probes, err := js.Stream(ctx, "UNCERTAINTY_PROBE")
	if err != nil {
		t.Fatal(err)
	}
	if state := probes.CachedInfo().State; state.Msgs != 2 || state.LastSeq != 6 {
		t.Errorf("the stream of probes: %+v", state)
	}
	stream, err := js.Stream(ctx, "UNCERTAINTY")
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.LastSeq; n != 0 {
		t.Errorf("%d messages among the alerts", n)
	}
	was := stream.CachedInfo().Config
	for want, change := range map[string]func(*jetstream.StreamConfig){
		"is full: 0 of 100 bytes": func(c *jetstream.StreamConfig) {
			c.Discard, c.MaxBytes = jetstream.DiscardNew, 100
		},
		"acknowledges nothing (no_ack)": func(c *jetstream.StreamConfig) { c.NoAck = true },
		"subject uncertainty.alert.> is not one of": func(c *jetstream.StreamConfig) {
			c.Subjects = []string{"uncertainty.other.>"}
		},
	} {
		broken := was
		change(&broken)
		if _, err := js.UpdateStream(ctx, broken); err != nil {
			t.Fatal(err)
		}
		if err := sink.Probe(ctx, "a"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
		if _, err := js.UpdateStream(ctx, was); err != nil {
			t.Fatal(err)
		}
		if err := sink.Probe(ctx, "a"); err != nil {
			t.Errorf("after %s: %v", want, err)
		}
	}
	// A probe that is not stored.
	config := probes.CachedInfo().Config
	config.Discard, config.MaxBytes = jetstream.DiscardNew, 1
	if _, err := js.UpdateStream(ctx, config); err != nil {
		t.Fatal(err)
	}
	if err := sink.Probe(ctx, "c"); err == nil || !strings.Contains(err.Error(),
		"store a probe in stream UNCERTAINTY_PROBE") {
		t.Errorf("with a full stream of probes: %v", err)
	}
}

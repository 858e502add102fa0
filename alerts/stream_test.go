package alerts_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/consumers/natstest"
)

// A stream of alerts whose settings can erase, replace, expire or add messages is refused by name, when it is found and
// when it is edited later.
func TestStreamThatWouldLoseAlertsIsRefused(t *testing.T) {
	js := natstest.Start(t).JetStream()
	sink := alerts.NewStreamSink(js, alerts.StreamConfig{})
	if err := sink.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "UNCERTAINTY")
	if err != nil {
		t.Fatal(err)
	}
	good := stream.CachedInfo().Config
	if !good.DenyDelete || good.AllowRollup || good.MaxConsumers <= 0 {
		t.Errorf("a new stream is %+v", good)
	}
	edited := good
	edited.MaxAge, edited.Duplicates = time.Second, time.Second
	if _, err := js.UpdateStream(t.Context(), edited); err != nil {
		t.Fatal(err)
	}
	if err := sink.Check(t.Context()); !errors.Is(err, alerts.ErrStreamConfig) ||
		!strings.Contains(err.Error(), "max_age is 1s, must be 0") {
		t.Errorf("a stream that was edited: %v", err)
	}
	if _, err := js.UpdateStream(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	if err := sink.Check(t.Context()); err != nil {
		t.Error(err)
	}
	for setting, change := range map[string]func(*jetstream.StreamConfig){
		"subjects":  func(c *jetstream.StreamConfig) { c.Subjects = []string{"uncertainty.alert.>"} },
		"retention": func(c *jetstream.StreamConfig) { c.Retention = jetstream.WorkQueuePolicy },
		"storage":   func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage },
		"sources":   func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "OTHER"}} },
		"subject_transform": func(c *jetstream.StreamConfig) {
			c.SubjectTransform = &jetstream.SubjectTransformConfig{Source: "uncertainty.>", Destination: "other.>"}
		},
		"no_ack":            func(c *jetstream.StreamConfig) { c.NoAck = true },
		"allow_rollup_hdrs": func(c *jetstream.StreamConfig) { c.AllowRollup, c.DenyPurge = true, false },
		"allow_msg_ttl":     func(c *jetstream.StreamConfig) { c.AllowMsgTTL = true },
		"persist_mode":      func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode },
	} {
		if err := js.DeleteStream(t.Context(), "UNCERTAINTY"); err != nil {
			t.Fatal(err)
		}
		c := jetstream.StreamConfig{Name: "UNCERTAINTY", Subjects: []string{"uncertainty.>"}}
		change(&c)
		if _, err := js.CreateStream(t.Context(), c); err != nil {
			t.Fatalf("%s: %v", setting, err)
		}
		if err := sink.Ensure(t.Context()); !errors.Is(err, alerts.ErrStreamConfig) ||
			!strings.Contains(err.Error(), setting) {
			t.Errorf("error is %v, want one that names %s", err, setting)
		}
	}
}

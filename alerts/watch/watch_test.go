package watch_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/watch"
	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/schema"
)

// publish stores an alert as a sink does, but without the id by which the stream drops a duplicate.
func publish(t *testing.T, js jetstream.JetStream, id string, class int, label string) {
	t.Helper()
	a := schema.Alert{
		ID: id, Kind: schema.AlertScore, Source: "/tests", EventID: id, EventTime: time.Now().UTC(), Model: "tiny",
		ClassIndex: class, ClassLabel: label, Severity: schema.SeverityWarn, Reason: schema.ReasonClass,
		Measurement: schema.ClassGap, Value: 2, Decided: 2, Threshold: 1, FiredAt: time.Now().UTC(),
	}
	_, body, err := schema.EncodeAlert(a)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: schema.AlertSubject(a), Data: body}); err != nil {
		t.Fatal(err)
	}
}

func TestRun(t *testing.T) {
	js, err := jetstream.New(natstest.Start(t).Connect())
	if err != nil {
		t.Fatal(err)
	}
	all := watch.Config{Stream: "UNCERTAINTY", All: true, Log: slog.New(slog.DiscardHandler)}
	never := func(schema.Alert) error { return errors.New("an alert of no stream") }
	if err := watch.Run(t.Context(), js, all, never); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Fatalf("without a stream: %v", err)
	}
	if err := alerts.NewStreamSink(js, alerts.StreamConfig{}).Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	publish(t, js, "first", 1, "Bag")
	publish(t, js, "second", 2, "Coat")
	publish(t, js, "first", 1, "Bag") // at least once
	if _, err := js.Publish(t.Context(), "uncertainty.alert.tiny.warn.1", []byte("not an alert")); err != nil {
		t.Fatal(err)
	}

	with := func(change func(*watch.Config)) watch.Config {
		c := all
		change(&c)
		return c
	}
	for name, c := range map[string]struct {
		watch.Config
		want []string
	}{
		"all":             {all, []string{"first", "second"}},
		"new ones only":   {with(func(c *watch.Config) { c.All = false }), nil},
		"of an hour":      {with(func(c *watch.Config) { c.All, c.Since = false, time.Hour }), []string{"first", "second"}},
		"of a nanosecond": {with(func(c *watch.Config) { c.All, c.Since = false, 1 }), nil},
		"class by index":  {with(func(c *watch.Config) { c.Class = "2" }), []string{"second"}},
		"class by label":  {with(func(c *watch.Config) { c.Class = "bag" }), []string{"first"}},
		"severity":        {with(func(c *watch.Config) { c.Severity = schema.SeverityCritical }), nil},
		"model":           {with(func(c *watch.Config) { c.Model = "tiny" }), []string{"first", "second"}},
	} {
		t.Run(name, func(t *testing.T) {
			var shown []string
			err := watch.Run(t.Context(), js, c.Config, func(a schema.Alert) error {
				shown = append(shown, a.ID)
				return nil
			})
			if err != nil || !slices.Equal(shown, c.want) {
				t.Errorf("shown are %q, want %q, %v", shown, c.want, err)
			}
		})
	}

	// Following shows what comes later, until the context ends.
	ctx, stop := context.WithCancel(t.Context())
	publish(t, js, "third", 3, "Shirt")
	follow := with(func(c *watch.Config) { c.Follow = true })
	shown := 0
	if err := watch.Run(ctx, js, follow, func(a schema.Alert) error {
		if shown++; a.ID == "third" {
			publish(t, js, "fourth", 4, "Dress")
		}
		if a.ID == "fourth" {
			stop()
		}
		return nil
	}); err != nil || shown != 4 {
		t.Errorf("followed %d alerts, want 4, %v", shown, err)
	}
}

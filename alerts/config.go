package alerts

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/settings"
)

// Config lists the sinks of alerts. Fields with a name are settings.
type Config struct {
	StreamConfig
	// URL that each alert is posted to as well. Defaults to none.
	WebhookURL string `name:"webhook-url" placeholder:"URL"`
	// File with the key that signs posted alerts (Standard Webhooks: base64 of at least 24 bytes). Defaults to none:
	// not signed.
	WebhookSecretFile string `name:"webhook-secret-file" placeholder:"FILE"`
	// Format of posted alerts: cloudevents, or slack for receivers of a line of text.
	WebhookFormat string `name:"webhook-format" default:"cloudevents" oneof:"cloudevents,slack"`
	// URL of a Prometheus Alertmanager that gets each alert as well, without /api/v2. Defaults to none.
	AlertmanagerURL string `name:"alertmanager-url" placeholder:"URL"`
	// Beginning of the link to the review page of an alert, in webhooks and Alertmanager; the alert's id follows.
	// Defaults to review.url with /review/ if that is given, else to none.
	Link string `name:"link" placeholder:"URL"`
}

// Check returns an error that names the settings out of their bounds.
func (c Config) Check() error {
	if c.WebhookSecretFile != "" && c.WebhookURL == "" {
		return settings.Errorf("alerts.webhook-secret-file is given without alerts.webhook-url")
	}
	return errors.Join(
		settings.Check("alerts", c), settings.Check("alerts", c.StreamConfig),
		settings.StreamName("alerts.stream", c.Stream), settings.WebAddress("alerts.webhook-url", c.WebhookURL),
		settings.WebAddress("alerts.alertmanager-url", c.AlertmanagerURL), settings.WebAddress("alerts.link", c.Link),
	)
}

// Sinks returns the sinks of alerts, the stream first.
func (c Config) Sinks(js jetstream.JetStream) (*StreamSink, []Sink, error) {
	stream := NewStreamSink(js, c.StreamConfig)
	sinks := []Sink{stream}
	if c.WebhookURL != "" {
		cfg := WebhookConfig{URL: c.WebhookURL, Format: c.WebhookFormat, Link: c.Link}
		if c.WebhookSecretFile != "" {
			secret, err := os.ReadFile(c.WebhookSecretFile)
			if err != nil {
				return nil, nil, fmt.Errorf("alerts.webhook-secret-file: %w", err)
			}
			cfg.Secret = strings.TrimSpace(string(secret))
		}
		sink, err := NewWebhook(cfg)
		if err != nil {
			return nil, nil, settings.Errorf("alerts.webhook-url: %w", err)
		}
		sinks = append(sinks, sink)
	}
	if c.AlertmanagerURL != "" {
		sink, err := NewAlertmanager(AlertmanagerConfig{URL: c.AlertmanagerURL, Link: c.Link})
		if err != nil {
			return nil, nil, settings.Errorf("alerts.alertmanager-url: %w", err)
		}
		sinks = append(sinks, sink)
	}
	return stream, sinks, nil
}

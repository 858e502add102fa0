package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/watch"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

type watchCmd struct {
	Model    modelName       `placeholder:"NAME" help:"Only this model."`
	Severity schema.Severity `enum:"warn,critical," default:"" placeholder:"warn|critical" help:"Only this severity."`
	Class    string          `placeholder:"CLASS" help:"Only this class: an index, or a label."`
	Since    time.Duration   `placeholder:"DURATION" help:"Start with alerts of the last DURATION. Defaults to new ones."`
	All      bool            `help:"Start with every alert in the stream."`
	NoFollow bool            `help:"Stop after the last alert instead of waiting for more."`
	JSON     bool            `name:"json" help:"Print each alert as one line of JSON."`

	ReviewURL string `name:"review.url" default:"http://127.0.0.1:8080" group:"Review" help:"Address of the review page."`

	NATS   app.NATSConfig `embed:"" prefix:"nats." group:"NATS"`
	Alerts alerts.Config  `embed:"" prefix:"alerts." group:"Alerts" shows:"stream,link"`
}

func (watchCmd) Help() string {
	return `Alerts reach the stream at least once; each is printed once.

Examples:

  decuwatch watch
  decuwatch watch --severity critical --since 1h
  decuwatch watch --all --no-follow --json | jq -r '[.class_label, .decided] | @tsv'`
}

func (c *watchCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if err := settings.WebAddress("review.url", c.ReviewURL); err != nil {
		return err
	}
	if c.Since < 0 {
		return usage("--since is %s, must be 0 or more", c.Since)
	}
	if c.All && c.Since > 0 {
		return usage("--all and --since exclude each other")
	}
	return app.WithNATS("watch", c.NATS, log, func(js jetstream.JetStream) error {
		follow := watch.Config{
			Stream: c.Alerts.Stream, Model: string(c.Model), Severity: c.Severity, Class: c.Class,
			All: c.All, Since: c.Since, Follow: !c.NoFollow, Log: log,
		}
		if !c.NoFollow && s.terminal && !c.JSON {
			fmt.Fprintf(s.err, "watching %s on %s; Ctrl-C ends\n", follow.Subject(), settings.Redact(c.NATS.URL))
		}
		return watch.Run(ctx, js, follow, func(a schema.Alert) error { return c.print(s, a) })
	})
}

func (c *watchCmd) print(s *streams, a schema.Alert) error {
	if c.JSON {
		return writeJSON(s.out, a)
	}
	fmt.Fprintln(s.out, watch.Line(a, s.terminal))
	link := c.Alerts.Link
	if link == "" {
		link = app.ReviewLink(c.ReviewURL)
	}
	if link != "" {
		fmt.Fprintf(s.out, "    %s%s\n", link, a.ID)
	}
	return nil
}

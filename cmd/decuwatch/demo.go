package main

import (
	"context"
	"time"

	"github.com/decuwatch/decuwatch/internal/demo"
)

type demoCmd struct {
	Dir        string        `default:".decuwatch" help:"Directory for the data, kept for the next run."`
	Requests   int           `default:"200" help:"Number of generation requests to publish."`
	Ensemble   string        `default:"ensembles/fashion-mnist" placeholder:"PATH" help:"Ensemble that scores."`
	Stay       string        `default:"auto" enum:"auto,yes,no" help:"Stay up until Ctrl-C; auto means on a terminal."`
	Timeout    time.Duration `default:"10m" help:"Longest time until every request has its verdict."`
	NATSPort   int           `name:"nats-port" default:"4222" help:"Port of NATS; another one if it is taken, or if 0."`
	HTTPPort   int           `name:"metrics-port" default:"9464" help:"Port of metrics and health, likewise."`
	ReviewPort int           `default:"8080" help:"Port of the review page, likewise."`
	Library    string        `name:"scoring.library" placeholder:"FILE" help:"ONNX Runtime's library, as for serve."`
}

func (demoCmd) Help() string {
	return `Starts its own NATS server with JetStream and its own Postgres below --dir, migrates, serves, publishes
generation requests over all classes, and prints the results. On a terminal everything stays up until Ctrl-C, so that
you can look around. Otherwise it ends once NATS and Postgres reconcile.

Examples:

  decuwatch demo
  decuwatch demo --requests 1000 --stay no`
}

func (c *demoCmd) Run(ctx context.Context, s *streams) error {
	if c.Requests < 1 || c.Requests > 1_000_000 {
		return usage("--requests is %d, must be 1 to 1000000", c.Requests)
	}
	for name, port := range map[string]int{
		"--nats-port": c.NATSPort, "--metrics-port": c.HTTPPort, "--review-port": c.ReviewPort,
	} {
		if port < 0 || port > 65535 {
			return usage("%s is %d, must be 0 to 65535", name, port)
		}
	}
	if c.Timeout <= 0 {
		return usage("--timeout is %s, must be more than 0", c.Timeout)
	}
	o := demo.Options{
		Dir: c.Dir, Ensemble: c.Ensemble, Library: c.Library, Requests: c.Requests, Timeout: c.Timeout,
		Stay:     c.Stay == "yes" || c.Stay == "auto" && s.terminal,
		NATSPort: c.NATSPort, MetricsPort: c.HTTPPort, ReviewPort: c.ReviewPort, Out: s.out, Colour: s.terminal,
	}
	o.Version, o.Revision = built()
	if s.progress {
		o.Progress = s.err
	}
	return demo.Run(ctx, o)
}

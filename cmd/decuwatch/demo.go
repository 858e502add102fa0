package main

import (
	"context"
	"time"

	"github.com/decuwatch/decuwatch/internal/demo"
)

type demoCmd struct {
	Dir        string        `default:".decuwatch" placeholder:"DIR" help:"Where the servers keep their data; a second run uses it again."`
	Requests   int           `default:"200" help:"Generation requests to publish."`
	Ensemble   string        `default:"ensembles/fashion-mnist" placeholder:"PATH" help:"Ensemble that scores."`
	Stay       string        `default:"auto" enum:"auto,yes,no" help:"Stay up after the summary until Ctrl-C: yes, no, or auto, which is yes on a terminal."`
	Timeout    time.Duration `default:"10m" help:"Longest time until every request has its verdict."`
	NATSPort   int           `name:"nats-port" default:"4222" help:"Port of the NATS server where it is free, else any; 0 is any."`
	HTTPPort   int           `name:"metrics-port" default:"9464" help:"Port of metrics and health where it is free, else any; 0 is any."`
	ReviewPort int           `default:"8080" help:"Port of the review page where it is free, else any; 0 is any."`
	Library    string        `name:"scoring.library" placeholder:"FILE" help:"ONNX Runtime's shared library. Defaults to where serve finds it."`
}

func (demoCmd) Help() string {
	return `Starts a NATS server with JetStream and a Postgres of its own below --dir, migrates, serves, publishes real generation requests over all classes and noise seeds, and prints what became of them. On a terminal everything stays up until Ctrl-C, for you to look around; otherwise it ends once both sides reconcile.

Examples:

  decuwatch demo
  decuwatch demo --requests 1000 --stay no`
}

// Run shows the monitor end to end.
func (c *demoCmd) Run(ctx context.Context, s *streams) error {
	if c.Requests < 1 || c.Requests > 1_000_000 {
		return usage("--requests is %d, must be 1 to 1000000", c.Requests)
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

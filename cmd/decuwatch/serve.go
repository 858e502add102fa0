package main

import (
	"context"
	"log/slog"

	"github.com/decuwatch/decuwatch/internal/app"
)

type serveCmd struct {
	app.Config `embed:""`
}

func (serveCmd) Help() string {
	return `Takes generation events from JetStream, reruns each through its model's ensemble, stores the score, and
publishes an alert if the score exceeds its threshold. On SIGTERM or Ctrl-C it stops pulling, finishes what is in
flight within consumers.drain-timeout, and gives the rest back.

Examples:

  decuwatch serve -e ensembles/fashion-mnist --postgres.migrate
  decuwatch serve --config /etc/decuwatch.yaml --log.format json`
}

// Run serves until ctx ends.
func (c *serveCmd) Run(ctx context.Context, log *slog.Logger) error {
	version, revision := built()
	return app.Serve(ctx, c.Config, app.Options{Log: log, Version: version, Revision: revision})
}

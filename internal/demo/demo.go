// Package demo shows the monitor end to end on one machine, with servers of its own.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/alerts/watch"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/monitor/reconcile"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/schema/postgres/local"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Options say what is shown, and where.
type Options struct {
	Dir      string        // the servers keep their data here
	Ensemble string        // directory, or manifest
	Library  string        // ONNX Runtime's shared library, or ""
	Requests int           // to publish
	Timeout  time.Duration // until every request has its verdict
	Stay     bool          // follow alerts at the end, until the context ends

	NATSPort, MetricsPort, ReviewPort int // any other port if the port is taken; 0 is any

	Version, Revision string // of the program

	Out      io.Writer
	Progress io.Writer // for progress bars. nil draws none
	Colour   bool
}

// demo is one run.
type demo struct {
	Options
	began time.Time
	log   *slog.Logger
	life  *app.Lifecycle
	cfg   app.Config

	ensemble *ensemble.Ensemble
	broker   *server.Server
	database *local.Server
	store    *postgres.Store
	js       jetstream.JetStream
	up       app.Serving
}

// Run starts NATS, Postgres and the monitor, publishes requests, and prints the results. A second run in the same
// directory continues with the data of the first. It fails while the first one runs.
func Run(ctx context.Context, o Options) (err error) {
	d := &demo{Options: o, began: time.Now(), cfg: app.DefaultConfig()}
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	path := filepath.Join(d.Dir, "decuwatch.log")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644) //nolint:gosec // the user may read it
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // a lost line is no reason to fail
	d.log = slog.New(slog.NewTextHandler(file, nil))
	slog.SetDefault(d.log)
	d.life, ctx = app.NewLifecycle(ctx, d.log)
	defer d.life.End(&err)

	if err := d.startServers(ctx); err != nil {
		return err
	}
	if err := d.serve(ctx); err != nil {
		return fmt.Errorf("%w\nsee %s", err, path)
	}
	fmt.Fprintln(d.Out)
	events, took, err := d.requests(ctx)
	if err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	if err := d.published(ctx); err != nil {
		return err
	}
	if err := d.summary(ctx, events, took); err != nil {
		return err
	}
	if err := d.reconcile(ctx); err != nil {
		return err
	}
	d.addresses(path)
	if !d.Stay {
		fmt.Fprintf(d.Out, "\nEverything stops now. On a terminal, or with --stay yes, it stays up; "+
			"the next run goes on with the same data.\n")
		return nil
	}
	fmt.Fprintf(d.Out, "\nEverything stays up, and alerts appear below as they come. Ctrl-C ends it.\n\n")
	follow := watch.Config{Stream: d.cfg.Alerts.Stream, Follow: true, Log: d.log}
	return watch.Run(ctx, d.js, follow, func(a schema.Alert) error {
		_, err := fmt.Fprintln(d.Out, watch.Line(a, d.Colour))
		return err
	})
}

// say prints one line about a part that was started.
func (d *demo) say(what, format string, args ...any) {
	at := fmt.Sprintf("%5.1fs", time.Since(d.began).Seconds())
	if d.Colour {
		at = terminal.Dim(at)
	}
	fmt.Fprintf(d.Out, "%s  %-10s %s\n", at, what, fmt.Sprintf(format, args...))
}

// serve runs the monitor, and connects to its NATS server.
func (d *demo) serve(ctx context.Context) error {
	served := make(chan app.Serving, 1)
	d.life.Run("serve", func(ctx context.Context) error {
		return app.Serve(ctx, d.cfg, app.Options{
			Log: d.log, Version: d.Version, Revision: d.Revision, Started: func(s app.Serving) { served <- s },
		})
	})
	select {
	case d.up = <-served:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	d.say("monitor", "serving, http://%s/metrics", d.up.Metrics)
	d.say("review", "http://%s/", d.up.Review)
	nc, err := d.cfg.NATS.Connect("demo", false, d.log)
	if err != nil {
		return err
	}
	d.life.OnStop("connection", func() error { nc.Close(); return nil })
	d.js, err = jetstream.New(nc)
	return err
}

// reconcile prints that the stream and Postgres agree, or fails.
func (d *demo) reconcile(ctx context.Context) error {
	r, err := reconcile.Run(ctx, reconcile.Options{
		JetStream: d.js, Store: d.store, Events: d.cfg.Stream.Name, Alerts: d.cfg.Alerts.Stream,
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(d.Out, "\nReconciled: %d messages in the stream = %d scores + %d skips + %d dead letters + %d repeats; "+
		"%d alerts in Postgres, %d published, %d held back.\n",
		r.Messages, r.Scores, r.Skips, r.DeadLetters, r.Repeats, r.Alerts, r.Published, r.HeldBack)
	if !r.Agrees() || r.Waiting > 0 {
		return fmt.Errorf("the stream and Postgres do not agree: %+v", *r)
	}
	return nil
}

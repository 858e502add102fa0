package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/rescore"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type rescoreCmd struct {
	Model    modelName `required:"" placeholder:"NAME" help:"Model whose events are scored again."`
	Since    *moment   `required:"" placeholder:"TIME" help:"Oldest event: RFC 3339, a date, or how long ago (72h)."`
	Until    *moment   `placeholder:"TIME" help:"Events before this time. Defaults to now."`
	Class    []string  `sep:"none" placeholder:"CLASS" help:"Only this class, index or label; may be repeated."`
	Ensemble string    `placeholder:"PATH" help:"Ensemble to score with. Defaults to the live one."`
	Share    float64   `default:"1" placeholder:"SHARE" help:"Share of the events, 0 to 1; the same ones each time."`
	Alert    bool      `help:"Let the scores raise alerts."`
	DryRun   bool      `name:"dry-run" help:"Print events, rows and time, and change nothing."`
	JSON     bool      `name:"json" help:"Print the result as JSON."`

	NATS     app.NATSConfig     `embed:"" prefix:"nats." group:"NATS"`
	Rescore  rescore.Config     `embed:"" prefix:"rescore." group:"Re-scores" shows:"stream"`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (rescoreCmd) Help() string {
	return `Scores stored events again, with an ensemble that a worker serves, live or as a shadow (scoring.shadows). ` +
		`The workers do it behind live work. The verdicts stay as they are: the new scores are in the view all_scores, and ` +
		`thresholds can be calibrated from them. Events that were not scored, because they were skipped or sampled out, ` +
		`and canaries are left out.

Ctrl-C takes back what waits; what was scored stays. Run the same command again to go on. Exit code 1 if events ` +
		`could not be scored: decuwatch_views.rescore_failures says why.

Examples:

  decuwatch rescore --model fashion-mnist --since 720h --dry-run
  decuwatch rescore --model fashion-mnist --since 2026-11-01 --ensemble ensembles/next --class Bag --share 0.1`
}

func (c *rescoreCmd) validate(now time.Time) error {
	until := c.Until.or(now)
	switch {
	case !(c.Share > 0 && c.Share <= 1):
		return usage("--share is %g, must be above 0 and at most 1", c.Share)
	case !c.Since.Before(until):
		return usage("--since is %s, must be before --until, %s", c.Since.Format(time.RFC3339), until.Format(time.RFC3339))
	}
	return nil
}

func (c *rescoreCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	now := time.Now().UTC()
	if err := c.validate(now); err != nil {
		return err
	}
	return app.WithServers(ctx, "rescore", c.NATS, c.Postgres, log,
		func(js jetstream.JetStream, store *postgres.Store) error {
			o := rescore.Options{
				Query: postgres.RescoreQuery{Since: c.Since.Time, Until: c.Until.or(now)}, Share: c.Share, Alert: c.Alert,
			}
			for _, text := range c.Class {
				class, _, err := storedClass(ctx, store, string(c.Model), text)
				if err != nil {
					return err
				}
				o.Query.Classes = append(o.Query.Classes, *class)
			}
			var err error
			if o.Query.Series, err = c.series(ctx, store); err != nil {
				return err
			}
			run := rescore.NewRun(js, store, c.Rescore, o)
			if c.DryRun {
				return c.estimate(ctx, s, store, run, o)
			}
			return c.do(ctx, s, run)
		})
}

// series returns the series that the events get a score of: of the ensemble at --ensemble, or of the live one.
func (c *rescoreCmd) series(ctx context.Context, store *postgres.Store) (schema.Series, error) {
	if c.Ensemble != "" {
		e, err := ensemble.Open(c.Ensemble)
		if err != nil {
			return schema.Series{}, err
		}
		if e.Name != string(c.Model) {
			return schema.Series{}, usage("--ensemble %s is named %s, must be named as --model, %s", c.Ensemble, e.Name,
				string(c.Model))
		}
		return app.SeriesOf(e), nil
	}
	return rescore.Live(ctx, store, string(c.Model))
}

// estimate prints what the run would cost.
func (c *rescoreCmd) estimate(ctx context.Context, s *streams, store *postgres.Store, run *rescore.Run,
	o rescore.Options,
) error {
	e, err := run.Estimate(ctx)
	if err != nil {
		return err
	}
	if c.JSON {
		return writeJSON(s.out, e)
	}
	if err := printEstimate(s.out, o, e); err != nil {
		return err
	}
	if err := rescore.Served(ctx, store, o.Query.Series); errors.Is(err, rescore.ErrNotServed) {
		_, err = fmt.Fprintf(s.out, "\n%s\n", err)
		return err
	} else if err != nil {
		return err
	}
	return nil
}

func printEstimate(out io.Writer, o rescore.Options, e rescore.Estimate) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	q := o.Query
	fmt.Fprintf(w, "events\t%d of %s, from %s to %s, that have no score of it\n", e.Events, q.Series.Model,
		q.Since.Format(time.RFC3339), q.Until.Format(time.RFC3339))
	fmt.Fprintf(w, "ensemble\t%s (%s)\n", q.Series.EnsembleDigest, q.Series.Settings)
	switch {
	case e.Rows == 0:
		fmt.Fprintf(w, "rows\tunknown: this ensemble has no score yet, rescore a few events first (--share)\n")
	case e.RowsPerSecond == 0:
		fmt.Fprintf(w, "rows\t%.0f, %.0f for each event\n", e.Rows*float64(e.Events), e.Rows)
		fmt.Fprintf(w, "time\tunknown: the workers scored too little in the last day to measure their rate\n")
	default:
		fmt.Fprintf(w, "rows\t%.0f, %.0f for each event\n", e.Rows*float64(e.Events), e.Rows)
		fmt.Fprintf(w, "rate\t%.0f rows a second, in the workers' busiest minute of the last day\n", e.RowsPerSecond)
		fmt.Fprintf(w, "time\t%s at this rate, if no events come\n", rounded(e.Time()))
	}
	return w.Flush()
}

// do runs it, with a progress bar or lines of progress.
func (c *rescoreCmd) do(ctx context.Context, s *streams, run *rescore.Run) error {
	began := time.Now()
	show := newProgressLines(s, "scoring")
	run.Progress = func(p rescore.Progress) { show.at(p.Done, p.Total) }
	done, failed, err := run.Do(ctx)
	show.end()
	if err != nil {
		if ctx.Err() != nil {
			fmt.Fprintf(s.err, "canceled after %d events: what waited was taken back; run it again to go on\n", done)
		}
		return err
	}
	lost := 0
	var why []string
	for _, f := range failed {
		lost += f.Events
		why = append(why, fmt.Sprintf("%d %s (%s)", f.Events, f.Kind, printable(f.Reason)))
	}
	if c.JSON {
		err = writeJSON(s.out, map[string]any{"events": done, "failed": lost, "seconds": time.Since(began).Seconds()})
	} else {
		_, err = fmt.Fprintf(s.out, "%d events scored again in %s\n", done-lost, rounded(time.Since(began)))
	}
	if err == nil && lost > 0 {
		err = fmt.Errorf("%d of %d events could not be scored again: %s", lost, done, strings.Join(why, ", "))
	}
	return err
}

// rounded returns a duration as people read it.
func rounded(d time.Duration) time.Duration {
	if d < time.Second {
		return d.Round(time.Millisecond)
	}
	return d.Round(time.Second)
}

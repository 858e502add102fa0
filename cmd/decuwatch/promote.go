package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor/rescore"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type promoteCmd struct {
	New      string             `arg:"" help:"Shadow ensemble that is to take over: a directory, or a manifest."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (promoteCmd) Help() string {
	return `Checks that a shadow ensemble can take over without a gap in alerting: every worker of the model serves it, ` +
		`it has a threshold for whatever has one now, and it has scored events that the live ensemble scored. Then it ` +
		`prints the settings to change. Workers that follow one after the other score with one or the other ensemble ` +
		`meanwhile, each event by the thresholds of its own. Nothing is changed by this command. Exit code 3 if the ` +
		`ensemble is not ready.

Example:

  decuwatch promote ensembles/next`
}

func (c *promoteCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	e, err := ensemble.Open(c.New)
	if err != nil {
		return err
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		to := app.SeriesOf(e)
		from, err := rescore.Live(ctx, store, to.Model)
		if err != nil {
			return err
		}
		if from == to {
			_, err := fmt.Fprintf(s.out, "%s scores %s already.\n", to.EnsembleDigest, to.Model)
			return err
		}
		wrong, err := c.wrong(ctx, s, store, from, to)
		if err != nil {
			return err
		}
		for _, text := range wrong {
			fmt.Fprintf(s.out, "not ready: %s\n", text)
		}
		if len(wrong) > 0 {
			return errDifference
		}
		_, err = fmt.Fprintf(s.out, `ready: change these settings of the workers of %s, one worker after the other

  scoring.ensembles: %s in place of the ensemble %.12s
  scoring.shadows:   the ensemble %.12s in place of %s

When nobody wants to go back any more, take it out of scoring.shadows.
`, to.Model, c.New, from.EnsembleDigest, from.EnsembleDigest, c.New)
		return err
	})
}

// wrong returns what keeps the ensemble from taking over. It prints what would change.
func (c *promoteCmd) wrong(ctx context.Context, s *streams, store *postgres.Store, from, to schema.Series,
) (wrong []string, err error) {
	workers, err := rescore.Workers(ctx, store, to.Model)
	if err != nil {
		return nil, err
	}
	for _, w := range workers {
		if !w.Serves(to.EnsembleDigest) {
			wrong = append(wrong, fmt.Sprintf("the worker on %s, started at %s, does not serve it: add it to scoring.shadows",
				w.Host, w.StartedAt.UTC().Format(time.RFC3339)))
		}
	}
	thresholds, err := store.Thresholds(ctx)
	if err != nil {
		return nil, err
	}
	wrong = append(wrong, lacking(thresholds, from, to)...)
	now := time.Now()
	result, err := compareSeries(ctx, store, from, to, now.AddDate(0, 0, -30), now)
	if errors.Is(err, errNothingInCommon) {
		return append(wrong, err.Error()), nil
	}
	if err != nil {
		return nil, err
	}
	t := result.Total
	_, err = fmt.Fprintf(s.out, "On the %d events of the last 30 days that both scored, %d raise an alert now and %d "+
		"after the switch: %d appear, %d disappear.\n", t.Events, t.Before, t.After, t.Appear, t.Disappear)
	return wrong, err
}

// lacking names what has a threshold of one series and none of the other.
func lacking(thresholds []schema.Threshold, from, to schema.Series) (list []string) {
	for _, name := range schema.MeasurementNames() {
		for _, severity := range schema.Severities() {
			has := func(of schema.Series) bool {
				return slices.ContainsFunc(thresholds, func(t schema.Threshold) bool {
					return t.Series() == of && t.Measurement == name && t.Severity == severity && t.Scope != schema.ScopeLimit
				})
			}
			if has(from) && !has(to) {
				list = append(list, fmt.Sprintf("it has no %s threshold of %s: run decuwatch thresholds calibrate", severity, name))
			}
		}
	}
	return list
}

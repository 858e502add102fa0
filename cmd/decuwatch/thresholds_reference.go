package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type thresholdsReferenceCmd struct {
	Ensemble string `arg:"" help:"Ensemble: a directory, or a manifest."`
	Apply    bool   `help:"Set the thresholds. Without it they are only printed."`
	Reason   string `placeholder:"TEXT" default:"quantiles of the reference scores" help:"Why, for the history."`
	By       string `placeholder:"NAME" help:"Who sets them. Defaults to the user who runs this."`
	JSON     bool   `name:"json" help:"Print the change as one line of JSON."`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (thresholdsReferenceCmd) Help() string {
	return `An ensemble brings quantiles of the scores of its well-sampled classes. The first thresholds of a new
installation can come from them: warn from the 0.99 quantile, critical from the 0.999 quantile, for every class of the
model. They say nothing about your traffic: calibrate when there are scores. Nothing changes without --apply.

Examples:

  decuwatch thresholds from-reference ensembles/fashion-mnist
  decuwatch thresholds from-reference ensembles/fashion-mnist --apply`
}

func (c *thresholdsReferenceCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	e, err := ensemble.Open(c.Ensemble)
	if err != nil {
		return err
	}
	series := app.SeriesOf(e)
	change := app.ReferenceThresholds(e)
	if len(change) == 0 {
		return fmt.Errorf("ensemble %s brings no reference scores: set thresholds by hand (decuwatch thresholds set --help)",
			c.Ensemble)
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		impact, err := thresholdImpact(ctx, store, series, change)
		if err != nil {
			return err
		}
		if c.Apply {
			if c.By, err = person(c.By); err != nil {
				return err
			}
			set, err := store.SetThresholds(ctx, postgres.ThresholdChange{
				Kind: postgres.ChangeReference, SetBy: c.By, Reason: strings.TrimSpace(c.Reason), Thresholds: change,
			})
			if err != nil {
				return err
			}
			impact.Applied = set.ID
		}
		if c.JSON {
			return writeJSON(s.out, impact)
		}
		for _, t := range change {
			fmt.Fprintln(s.out, describeThreshold(t, e))
		}
		if err := impact.Print(s.out); err != nil {
			return err
		}
		if c.Apply {
			_, err = fmt.Fprintf(s.out, "Applied as change %d; take it back with: decuwatch thresholds rollback --reason ...\n",
				impact.Applied)
		} else {
			_, err = fmt.Fprintln(s.out, "Nothing was changed. Apply with --apply")
		}
		return err
	})
}

// thresholdImpact counts the alerts of the last week before and after a change.
func thresholdImpact(
	ctx context.Context, store *postgres.Store, series schema.Series, change []schema.Threshold,
) (*calibration.Impact, error) {
	now, err := store.Now(ctx)
	if err != nil {
		return nil, err
	}
	week := map[schema.MeasurementName][]schema.Sample{}
	for _, t := range change {
		if _, read := week[t.Measurement]; read {
			continue
		}
		week[t.Measurement], err = store.Samples(ctx, series, t.Measurement, now.Add(-7*24*time.Hour), now)
		if err != nil {
			return nil, err
		}
	}
	inForce, err := store.Thresholds(ctx)
	if err != nil {
		return nil, err
	}
	return calibration.NewImpact(series, change, week, inForce)
}

// describeThreshold returns a threshold with its whole scope, in one line.
func describeThreshold(t schema.Threshold, e *ensemble.Ensemble) string {
	scope := "every class without thresholds of its own"
	switch {
	case t.Scope == schema.ScopeLimit:
		scope = "absolute limit of every class"
	case t.Class != nil:
		scope = fmt.Sprintf("class %d %s", *t.Class, printable(e.Classes[*t.Class].Label))
	}
	distance := ""
	if t.Distance != nil {
		distance = fmt.Sprintf(", by the mean distance from %g if saturated", *t.Distance)
	}
	return fmt.Sprintf("%s of %s, %s: %s from %g%s (ensemble %.12s, settings %s)", t.Measurement, t.Model, scope,
		t.Severity, t.Value, distance, t.EnsembleDigest, t.Settings)
}

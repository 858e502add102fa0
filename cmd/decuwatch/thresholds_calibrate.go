package main

import (
	"cmp"
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type thresholdsCalibrateCmd struct {
	Ensemble    string                 `arg:"" optional:"" help:"Ensemble whose scores are read: directory or manifest."`
	Named       string                 `name:"ensemble" placeholder:"PATH" help:"The same, as a flag: live or a shadow."`
	Measurement schema.MeasurementName `required:"" enum:"${measurements}" placeholder:"NAME" help:"${enum}."`
	Alpha       float64                `required:"" placeholder:"RATE" help:"Share of usual requests that may alert."`
	Severity    schema.Severity        `default:"warn" enum:"warn,critical" help:"warn or critical."`
	Window      time.Duration          `default:"720h" help:"Length of the window of scores that ends at --to."`
	To          *time.Time             `placeholder:"TIME" help:"End of the window, RFC 3339. Defaults to now."`
	Pool        string                 `default:"well-sampled" enum:"well-sampled,all" help:"well-sampled or all classes."`
	LimitAlpha  float64                `placeholder:"RATE" help:"Also set an absolute limit at this rate of the pool."`
	Manual      bool                   `name:"replace-manual" help:"Also replace thresholds that were set by hand."`
	Settings    string                 `placeholder:"KEY" help:"Settings of the scores. Defaults to the ensemble's."`
	Apply       bool                   `help:"Set the thresholds. Without it the plan is only printed."`
	Reason      string                 `placeholder:"TEXT" help:"Why, for the history. Required with --apply."`
	By          string                 `placeholder:"NAME" help:"Who sets them. Defaults to the user who runs this."`
	JSON        bool                   `name:"json" help:"Print the plan as JSON."`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (thresholdsCalibrateCmd) Help() string {
	return `Reads stored scores and finds thresholds with a known false-alarm rate by conformal p-values. A class gets ` +
		`its own threshold if it has enough scores: alpha needs 1/alpha - 1 of them. Otherwise it shares the threshold of ` +
		`its cluster of classes with similar scores, or the model's. The model's threshold comes from the well-sampled ` +
		`classes, those with the most training images; --pool all takes every class. No class may pass an absolute limit. ` +
		`The scores of a shadow ensemble, and of decuwatch rescore, are read like live ones. ` +
		`Prints the plan; nothing changes without --apply.

Examples:

  decuwatch thresholds calibrate ensembles/fashion-mnist --measurement request_risk --alpha 0.01
  decuwatch thresholds calibrate ensembles/fashion-mnist --measurement class_gap --alpha 0.01 --limit-alpha 0.001 \
      --apply --reason "first month"`
}

func (c *thresholdsCalibrateCmd) check() error {
	switch {
	case (c.Ensemble == "") == (c.Named == ""):
		return usage("name one ensemble: as an argument, or with --ensemble")
	case !(c.Alpha > 0 && c.Alpha < 1):
		return usage("--alpha is %g, must lie between 0 and 1", c.Alpha)
	case c.LimitAlpha != 0 && !(c.LimitAlpha > 0 && c.LimitAlpha < 1):
		return usage("--limit-alpha is %g, must lie between 0 and 1", c.LimitAlpha)
	case c.Window <= 0:
		return usage("--window is %s, must be more than 0", c.Window)
	case c.Apply && strings.TrimSpace(c.Reason) == "":
		return usage("--apply needs a --reason for the history")
	}
	return nil
}

func (c *thresholdsCalibrateCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if err := c.check(); err != nil {
		return err
	}
	e, err := ensemble.Open(cmp.Or(c.Ensemble, c.Named))
	if err != nil {
		return err
	}
	if c.Apply {
		if c.By, err = person(c.By); err != nil {
			return err
		}
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		plan, err := c.plan(ctx, store, e)
		if err != nil {
			return err
		}
		if c.Apply {
			change, err := store.SetThresholds(ctx, postgres.ThresholdChange{
				Kind: postgres.ChangeCalibration, SetBy: c.By, Reason: strings.TrimSpace(c.Reason), Thresholds: plan.Change,
			})
			if err != nil {
				return err
			}
			plan.Applied = change.ID
		}
		if c.JSON {
			return writeJSON(s.out, plan)
		}
		return plan.Print(s.out)
	})
}

// plan reads the scores and the thresholds, and finds what would change.
func (c *thresholdsCalibrateCmd) plan(ctx context.Context, store *postgres.Store,
	e *ensemble.Ensemble) (*calibration.Plan, error) {
	to := time.Now()
	if c.To != nil {
		to = *c.To
	}
	to = to.UTC().Truncate(time.Microsecond)
	series := schema.Series{Model: e.Name, EnsembleDigest: e.Digest, Settings: cmp.Or(c.Settings, e.Profile.Settings())}
	config := calibration.Config{
		Key:   calibration.Key{Series: series, Measurement: c.Measurement, Severity: c.Severity},
		Alpha: c.Alpha, LimitAlpha: c.LimitAlpha, From: to.Add(-c.Window), To: to, Labels: e.Labels(),
		ReplaceManual: c.Manual,
	}
	if c.Pool == "well-sampled" {
		config.WellSampled = e.WellSampled()
	}
	samples, err := store.Samples(ctx, series, c.Measurement, config.From, to)
	if err != nil {
		return nil, err
	}
	week, err := store.Samples(ctx, series, c.Measurement, to.AddDate(0, 0, -7), to)
	if err != nil {
		return nil, err
	}
	now, err := store.Thresholds(ctx)
	if err != nil {
		return nil, err
	}
	return calibration.NewPlan(config, samples, week, now)
}

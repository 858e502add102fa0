package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type thresholdsSetCmd struct {
	Ensemble    string                 `arg:"" help:"Ensemble: a directory, or a manifest."`
	Measurement schema.MeasurementName `required:"" enum:"${measurements}" placeholder:"NAME" help:"${enum}."`
	Value       float64                `required:"" placeholder:"X" help:"An alert fires at or above it."`
	Severity    schema.Severity        `default:"warn" enum:"warn,critical" help:"warn or critical."`
	Class       string                 `placeholder:"CLASS" help:"Class: an index, or a label. Defaults to all others."`
	Limit       bool                   `help:"An absolute limit that applies beside the other thresholds, to every class."`
	Distance    *float64               `placeholder:"D" help:"Threshold of the mean distance of saturated measurements."`
	Settings    string                 `placeholder:"KEY" help:"Settings of the scores. Defaults to the ensemble's."`
	DryRun      bool                   `help:"Only print what would change."`
	Reason      string                 `required:"" placeholder:"TEXT" help:"Why, for the history."`
	By          string                 `placeholder:"NAME" help:"Who sets it. Defaults to the user who runs this."`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (thresholdsSetCmd) Help() string {
	return `A threshold belongs to the digest of the ensemble and the settings of its scores. Without --class it is for ` +
		`every class that has no threshold of its own. The most specific scope with any threshold decides: a class with a ` +
		`threshold of one severity no longer uses the model's thresholds of either severity. The output names what no ` +
		`longer applies. A critical threshold below the warn threshold of the same scope is refused. A saturated ` +
		`measurement is decided by its mean distance; without --distance it fires. The output says how many alerts of the ` +
		`last week the change adds or removes; with --dry-run nothing else happens.

Examples:

  decuwatch thresholds set ensembles/fashion-mnist --measurement class_gap --value 0.04 \
      --reason "99% of well-sampled classes"
  decuwatch thresholds set ensembles/fashion-mnist --measurement request_risk --class Bag \
      --severity critical --value 0.5 --reason "incident 12"
  decuwatch thresholds set ensembles/fashion-mnist --measurement class_gap --limit --severity critical \
      --value 0.2 --reason "no class may pass"`
}

func (c *thresholdsSetCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	e, err := ensemble.Open(c.Ensemble)
	if err != nil {
		return err
	}
	if c.By, err = person(c.By); err != nil {
		return err
	}
	t, err := c.threshold(e)
	if err != nil {
		return err
	}
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		impact, err := thresholdImpact(ctx, store, t.Series(), []schema.Threshold{t})
		if err != nil {
			return err
		}
		if c.DryRun {
			fmt.Fprintln(s.out, describeThreshold(t, e))
			if err := impact.Print(s.out); err != nil {
				return err
			}
			_, err := fmt.Fprintln(s.out, "Nothing was changed. Set it without --dry-run")
			return err
		}
		t, err := store.SetThreshold(ctx, t)
		if err != nil {
			return err
		}
		fmt.Fprintf(s.out, "threshold %d: %s\n", t.ID, describeThreshold(t, e))
		if err := impact.Print(s.out); err != nil {
			return err
		}
		table, err := alerts.ReadTable(ctx, store)
		if err != nil {
			return fmt.Errorf("the threshold is set, but what it sets aside is unknown: %w", err)
		}
		for _, aside := range table.Asides(t.Series(), t.Measurement, len(e.Classes)) {
			if aside.Concerns(t) {
				fmt.Fprintln(s.out, printable(aside.Text(e.Labels())))
			}
		}
		return nil
	})
}

// threshold returns the threshold that the flags describe.
func (c *thresholdsSetCmd) threshold(e *ensemble.Ensemble) (schema.Threshold, error) {
	t := schema.Threshold{
		Model: e.Name, EnsembleDigest: e.Digest, Settings: cmp.Or(c.Settings, e.Profile.Settings()),
		Measurement: c.Measurement, Scope: schema.ScopeModel, Severity: c.Severity, Value: c.Value, Distance: c.Distance,
		Origin: "manual", SetBy: c.By, Reason: strings.TrimSpace(c.Reason), SetAt: time.Now().UTC(),
	}
	switch {
	case math.IsNaN(t.Value) || math.IsInf(t.Value, 0):
		return t, usage("--value is %g, must be finite", t.Value)
	case t.Distance != nil && !(*t.Distance >= 0 && !math.IsInf(*t.Distance, 0)):
		return t, usage("--distance is %g, must be finite and 0 or more", *t.Distance)
	case t.Reason == "":
		return t, usage("--reason is empty")
	case c.Limit && c.Class != "":
		return t, usage("--limit and --class exclude each other: a limit applies to every class")
	case c.Limit:
		t.Scope = schema.ScopeLimit
	case c.Class != "":
		index, err := classIndex(e, c.Class)
		if err != nil {
			return t, err
		}
		t.Scope, t.Class = schema.ScopeClass, &index
	}
	return t, nil
}

// classIndex returns the index of a class that a flag names by its index or its label, in upper or lower case.
func classIndex(e *ensemble.Ensemble, text string) (int, error) {
	index := schema.ParseClass(text).Index
	if index < 0 {
		same := func(label string) bool { return strings.EqualFold(label, text) }
		exact, ok := e.ClassIndex(text)
		if index = exact; !ok {
			index = slices.IndexFunc(e.Labels(), same)
		}
		if index < 0 {
			return 0, usage("--class %q is no label of %s", text, e.Name)
		}
	}
	if index >= len(e.Classes) {
		return 0, usage("--class is %d, %s has the classes 0 to %d", index, e.Name, len(e.Classes)-1)
	}
	return index, nil
}

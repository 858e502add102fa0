package main

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os/user"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

type thresholdsCmd struct {
	List      thresholdsListCmd      `cmd:"" help:"List the thresholds in force."`
	Set       thresholdsSetCmd       `cmd:"" help:"Set one threshold; running monitors follow at once."`
	Calibrate thresholdsCalibrateCmd `cmd:"" help:"Find thresholds with a known false-alarm rate from stored scores."`
	History   thresholdsHistoryCmd   `cmd:"" help:"List changes of thresholds: who, when, why."`
	Rollback  thresholdsRollbackCmd  `cmd:"" help:"Take the newest change of thresholds back."`
}

type thresholdsListCmd struct {
	Model    string             `placeholder:"NAME" help:"Thresholds of this model only."`
	JSON     bool               `name:"json" help:"Print JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (thresholdsListCmd) Help() string {
	return `Example:

  decuwatch thresholds list --model fashion-mnist`
}

func (c *thresholdsListCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	store, err := c.Postgres.Open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()
	list, err := store.Thresholds(ctx)
	if err != nil {
		return err
	}
	if c.Model != "" {
		list = slices.DeleteFunc(list, func(t schema.Threshold) bool { return t.Model != c.Model })
	}
	if c.JSON {
		if list == nil {
			list = []schema.Threshold{}
		}
		return writeJSON(s.out, list)
	}
	if len(list) == 0 {
		fmt.Fprintln(s.out, "There are no thresholds: scores are stored, but raise no alert. Set one: decuwatch thresholds set --help")
		return nil
	}
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "id\tmodel\tensemble\tmeasurement\tscope\tseverity\tvalue\tdistance\torigin\tn\tset by\tset at\treason")
	for _, t := range list {
		scope := string(t.Scope)
		if t.Class != nil {
			scope = fmt.Sprintf("%s %d", t.Scope, *t.Class)
		}
		distance := "-"
		if t.Distance != nil {
			distance = fmt.Sprintf("%.4g", *t.Distance)
		}
		fmt.Fprintf(w, "%d\t%s\t%.8s\t%s\t%s\t%s\t%.4g\t%s\t%s\t%d\t%s\t%s\t%s\n", t.ID, t.Model, t.EnsembleDigest, t.Measurement, scope, t.Severity,
			t.Value, distance, t.Origin, t.N, printable(t.SetBy), t.SetAt.Local().Format(time.DateTime), printable(t.Reason))
	}
	return w.Flush()
}

type thresholdsSetCmd struct {
	Ensemble    string                 `arg:"" help:"Ensemble that the threshold is for: a directory, or a manifest. A threshold belongs to its digest and settings."`
	Measurement schema.MeasurementName `required:"" enum:"class_gap,request_risk" placeholder:"class_gap|request_risk" help:"Number that is held against the threshold."`
	Value       float64                `required:"" help:"An alert fires at or above it."`
	Severity    schema.Severity        `default:"warn" enum:"warn,critical" help:"warn or critical."`
	Class       string                 `placeholder:"CLASS" help:"Class that the threshold is for: an index, or a label. Defaults to every class without one of its own."`
	Limit       bool                   `help:"An absolute limit that applies beside the other thresholds, to every class."`
	Distance    *float64               `placeholder:"D" help:"Decides instead, on the mean distance, where the measurement is saturated. Defaults to none: a saturated measurement fires."`
	Settings    string                 `placeholder:"KEY" help:"Settings that the threshold is for, as a receipt has them. Defaults to the ensemble's fixed profile."`
	Reason      string                 `required:"" help:"Why, for the history."`
	By          string                 `placeholder:"NAME" help:"Who sets it. Defaults to the user who runs this."`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (thresholdsSetCmd) Help() string {
	return `The most specific scope with any threshold decides: a class with a threshold of one severity no longer uses the model's thresholds of either severity. The output names what no longer applies. A critical threshold below the warn threshold of the same scope is refused.

Examples:

  decuwatch thresholds set ensembles/fashion-mnist --measurement class_gap --value 0.04 --reason "99% of well-sampled classes"
  decuwatch thresholds set ensembles/fashion-mnist --measurement request_risk --class Bag --severity critical --value 0.5 --reason "incident 12"
  decuwatch thresholds set ensembles/fashion-mnist --measurement class_gap --limit --severity critical --value 0.2 --reason "no class may pass"`
}

func (c *thresholdsSetCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	e, err := ensemble.Open(c.Ensemble)
	if err != nil {
		return err
	}
	t, err := c.threshold(e)
	if err != nil {
		return err
	}
	store, err := c.Postgres.Open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()
	t, err = store.SetThreshold(ctx, t)
	if err != nil {
		return err
	}
	fmt.Fprintf(s.out, "threshold %d: %s of %s alerts as %s from %g\n", t.ID, t.Measurement, t.Model, t.Severity, t.Value)
	list, err := store.Thresholds(ctx)
	if err != nil {
		return fmt.Errorf("the threshold is set, but what it sets aside is unknown: %w", err)
	}
	table, err := alerts.NewTable(list)
	if err != nil {
		return fmt.Errorf("the threshold is set, but what it sets aside is unknown: %w", err)
	}
	for _, line := range setAside(table, e, t.Series(), t.Measurement) {
		if line.names(t) {
			fmt.Fprintln(s.out, line)
		}
	}
	return nil
}

// aside is a threshold that does not apply to some classes, because they have more specific ones.
type aside struct {
	threshold *schema.Threshold
	classes   []int
	labels    []string
}

// setAside returns the model's thresholds, and those of clusters, that do not apply to some classes.
func setAside(table *alerts.Table, e *ensemble.Ensemble, series schema.Series, measurement schema.MeasurementName) []*aside {
	var list []*aside
	for class := range e.Classes {
		for _, th := range table.SetAside(series, measurement, class) {
			i := slices.IndexFunc(list, func(a *aside) bool { return a.threshold == th })
			if i < 0 {
				i = len(list)
				list = append(list, &aside{threshold: th})
			}
			list[i].classes = append(list[i].classes, class)
			list[i].labels = append(list[i].labels, fmt.Sprintf("%d %s", class, printable(e.Classes[class].Label)))
		}
	}
	return list
}

// names tells whether the line is about the threshold t, or about its class.
func (a *aside) names(t schema.Threshold) bool {
	return a.threshold.ID == t.ID || t.Class != nil && slices.Contains(a.classes, *t.Class)
}

func (a *aside) String() string {
	return fmt.Sprintf("the %s's %s threshold %g does not apply to classes with more specific thresholds: %s",
		a.threshold.Scope, a.threshold.Severity, a.threshold.Value, strings.Join(a.labels, ", "))
}

// threshold returns what the flags say.
func (c *thresholdsSetCmd) threshold(e *ensemble.Ensemble) (schema.Threshold, error) {
	t := schema.Threshold{
		Model: e.Name, EnsembleDigest: e.Digest, Settings: c.Settings, Measurement: c.Measurement, Scope: schema.ScopeModel,
		Severity: c.Severity, Value: c.Value, Distance: c.Distance, Origin: "manual", SetBy: c.By, Reason: strings.TrimSpace(c.Reason), SetAt: time.Now().UTC(),
	}
	if t.Settings == "" {
		t.Settings = e.Profile.Settings()
	}
	if t.SetBy == "" {
		t.SetBy = "unknown"
		if u, err := user.Current(); err == nil {
			t.SetBy = u.Username
		}
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
		t.Scope = schema.ScopeClass
		index := class(c.Class).Index
		if index < 0 {
			var ok bool
			if index, ok = e.ClassIndex(c.Class); !ok {
				return t, usage("--class %q is no label of %s", c.Class, e.Name)
			}
		}
		if index >= len(e.Classes) {
			return t, usage("--class is %d, %s has the classes 0 to %d", index, e.Name, len(e.Classes)-1)
		}
		t.Class = &index
	}
	return t, nil
}

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os/user"
	"slices"
	"text/tabwriter"

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

type thresholdsCmd struct {
	List      thresholdsListCmd      `cmd:"" help:"List the thresholds in force."`
	Set       thresholdsSetCmd       `cmd:"" help:"Set one threshold; running monitors follow at once."`
	Reference thresholdsReferenceCmd `cmd:"" name:"from-reference" help:"Set the first thresholds of an ensemble."`
	Calibrate thresholdsCalibrateCmd `cmd:"" help:"Find thresholds with a known false-alarm rate from stored scores."`
	History   thresholdsHistoryCmd   `cmd:"" help:"List changes of thresholds: who, when, why."`
	Rollback  thresholdsRollbackCmd  `cmd:"" help:"Undo the newest change of thresholds."`
}

type thresholdsListCmd struct {
	Model    modelName          `placeholder:"NAME" help:"Thresholds of this model only."`
	JSON     bool               `name:"json" help:"Print each threshold as one line of JSON."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres" shows:"url,statement-timeout,lock-timeout"`
}

func (thresholdsListCmd) Help() string {
	return `Example:

  decuwatch thresholds list --model fashion-mnist`
}

func (c *thresholdsListCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	return app.WithStore(ctx, c.Postgres, log, func(store *postgres.Store) error {
		list, err := store.Thresholds(ctx)
		if err != nil {
			return err
		}
		if c.Model != "" {
			list = slices.DeleteFunc(list, func(t schema.Threshold) bool { return t.Model != string(c.Model) })
		}
		if c.JSON {
			return writeLines(s.out, list)
		}
		return printThresholds(s, list)
	})
}

func printThresholds(s *streams, list []schema.Threshold) error {
	if len(list) == 0 {
		_, err := fmt.Fprintln(s.out, "There are no thresholds: scores are stored, but raise no alert. "+
			"Set the first: decuwatch thresholds from-reference --help")
		return err
	}
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "id\tmodel\tensemble\tmeasurement\tscope\tseverity\tvalue\tdistance\torigin\tn\tset by\tset "+
		"at\treason")
	for _, t := range list {
		scope, distance := string(t.Scope), "-"
		if t.Class != nil {
			scope = fmt.Sprintf("%s %d", t.Scope, *t.Class)
		}
		if t.Distance != nil {
			distance = fmt.Sprintf("%.4g", *t.Distance)
		}
		fmt.Fprintf(w, "%d\t%s\t%.8s\t%s\t%s\t%s\t%.4g\t%s\t%s\t%d\t%s\t%s\t%s\n", t.ID, t.Model, t.EnsembleDigest,
			t.Measurement, scope, t.Severity, t.Value, distance, t.Origin, t.N,
			printable(t.SetBy), terminal.Time(t.SetAt), printable(t.Reason))
	}
	return w.Flush()
}

// serviceUser is the user of the program in its images.
const serviceUser = "decuwatch"

// person returns the given name, or else the user who runs the program. A history names people, so the user of the
// images, and one without a name, must give it.
func person(name string) (string, error) {
	if name != "" {
		return name, nil
	}
	u, err := user.Current()
	if err != nil {
		return "", usage("--by is required: the user who runs this has no name: %w", err)
	}
	if u.Username == serviceUser || u.Username == "" {
		return "", usage("--by is required: the user %q, uid %s, is no person", u.Username, u.Uid)
	}
	return u.Username, nil
}

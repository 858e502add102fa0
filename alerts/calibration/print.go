package calibration

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
)

// Print writes the plan as text: a row for each class, then the limit, what is set aside, and the alerts it changes.
func (p *Plan) Print(out io.Writer) error {
	fmt.Fprintf(out, "%s of %s (ensemble %.12s), %s at a false-alarm rate of %g,\nfrom %d scores of %s to %s\n\n",
		p.Measurement, p.Model, p.EnsembleDigest, p.Severity, p.Alpha, p.Scores,
		terminal.Time(p.WindowFrom), terminal.Time(p.WindowTo))
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "class\tscores\told\tfrom\tnew\tfrom\tn\trate\talerts last week: old\tnew\tremark")
	for _, l := range p.Classes {
		name := terminal.Printable(l.Label)
		if l.Class != nil {
			name = fmt.Sprintf("%d %s", *l.Class, name)
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%d\t%.3g\t%d\t%d\t%s\n", name, l.Scores, valueAndScope(l.Old, l.OldScope),
			valueAndScope(l.New, l.NewScope), l.N, l.Achieved, l.AlertsOld, l.AlertsNew, p.remark(l))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, t := range p.Change {
		if t.Scope == schema.ScopeLimit {
			fmt.Fprintf(out, "\nabsolute limit (critical) for every class: %.5g, at a rate of %g\n", t.Value, *t.Alpha)
		}
	}
	for i, aside := range p.Asides {
		if i == 0 {
			fmt.Fprintln(out)
		}
		fmt.Fprintln(out, terminal.Printable(aside.Text(p.labels())))
	}
	fmt.Fprintf(out, "\nAlerts on the %d scores of the last week: %d with the old thresholds, %d with the new.\n",
		p.WeekScores, p.AlertsOld, p.AlertsNew)
	if p.Applied != 0 {
		_, err := fmt.Fprintf(out, "Applied as change %d; take it back with: decuwatch thresholds rollback --reason ...\n",
			p.Applied)
		return err
	}
	_, err := fmt.Fprintln(out, "Nothing was changed. Apply with --apply --reason ...")
	return err
}

func valueAndScope(value *float64, scope schema.Scope) string {
	if value == nil {
		return "-\t-"
	}
	return fmt.Sprintf("%.5g\t%s", *value, scope)
}

func (p *Plan) remark(l Line) string {
	switch {
	case l.New == nil && l.Deciding != "":
		return fmt.Sprintf("%s does not apply: the %s's thresholds of another severity decide", p.Severity, l.Deciding)
	case l.Kept:
		return "set by hand, stays (--replace-manual)"
	case l.NewScope == schema.ScopeCluster:
		return fmt.Sprintf("pooled with classes %s; %d more scores for one of its own",
			strings.Trim(fmt.Sprint(l.Cluster), "[]"), l.Missing)
	case l.Class != nil && l.NewScope == schema.ScopeModel:
		return fmt.Sprintf("the model's; %d more scores for one of its own", l.Missing)
	}
	return ""
}

func (p *Plan) labels() []string {
	var labels []string
	for _, l := range p.Classes[1:] { // the model is first
		labels = append(labels, l.Label)
	}
	return labels
}

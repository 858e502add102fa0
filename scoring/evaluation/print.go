package evaluation

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Print writes the results as text: a table for each level, then how errors were measured.
func (r *Results) Print(w io.Writer) error {
	fmt.Fprintf(w, "%s (regime %s): %d rotations x %d classes x %d seeds = %d requests of each score; "+
		"95%% intervals over %d cells.\n", r.Ensemble, r.Regime, len(r.Manifests), r.Classes, r.Seeds, r.Requests,
		len(r.Manifests)*r.Classes)
	fmt.Fprint(w, "\nClass level: does the score find under-sampled classes?\n\n")
	if err := printTable(w, r.classTable()); err != nil {
		return err
	}
	fmt.Fprint(w, "\nRequest level: does the score rank the requests of a class by their error?\n\n")
	if r.Error == nil {
		_, err := fmt.Fprintln(w, "Unknown: the tables file has no tensor \"reference\", "+
			"and without the fully trained table no request's error is known.")
		return err
	}
	if err := printTable(w, r.requestTable()); err != nil {
		return err
	}
	means := make([]string, len(r.Error.Means))
	for i, m := range r.Error.Means {
		means[i] = fmt.Sprintf("%.3g", m.Mean.Value)
	}
	_, err := fmt.Fprintf(w, "\nError: squared distance of final latents to the final latent under the fully trained "+
		"table, mean of the components; %d steps, guidance %g; mean by bin %s.\n",
		r.Error.Steps, r.Error.Guidance, strings.Join(means, " / "))
	return err
}

// hasControl reports whether the plain mean distance is another number than the score.
func (s *Score) hasControl() bool { return !strings.Contains(s.Settings, ensemble.MeanW2+"@") }

func (r *Results) classTable() [][]string {
	table := [][]string{
		{"score", "rows", "bin", "AUROC", "AUPRC", "TPR at 1% FPR", "same class", "rho", "mean by bin", "saturated"},
	}
	for _, s := range r.Scores {
		rows := strconv.Itoa(s.Rows)
		table = append(table, r.classRows(s.Settings, rows, fmt.Sprintf("%.0f%%", 100*s.Saturated), s.ClassLevel)...)
		if s.hasControl() {
			table = append(table, r.classRows("  its mean distance", rows, "-", s.MeanDistance.ClassLevel)...)
		}
	}
	return append(table, r.classRows("random scores", "0", "-", r.Random)...)
}

// classRows returns a row for each bin but the largest; only the first says what the bins have in common.
func (r *Results) classRows(name, rows, saturated string, level ClassLevel) [][]string {
	means := make([]string, len(level.Means))
	for i, m := range level.Means {
		means[i] = fmt.Sprintf("%.3g", m.Mean.Value)
	}
	line := []string{name, rows, "", "", "", "", "", optional(level.Rho), strings.Join(means, " / "), saturated}
	if len(level.Against) == 0 {
		return [][]string{line}
	}
	var table [][]string
	for i, a := range level.Against {
		same := "-"
		if a.SameClass != nil {
			same = fmt.Sprintf("%.3f (%d of %d)", *a.SameClass, a.ClassesAt, a.Classes)
		}
		copy(line[2:], []string{
			fmt.Sprintf("%g v %g", a.Bin, r.Bins[len(r.Bins)-1]), text(a.AUROC, 3), fmt.Sprintf("%.3f", a.AUPRC),
			fmt.Sprintf("%.2f", a.TPR), same,
		})
		if i > 0 {
			line[0], line[1], line[7], line[8], line[9] = "", "", "", "", ""
		}
		table = append(table, slices.Clone(line))
	}
	return table
}

func (r *Results) requestTable() [][]string {
	table := [][]string{{"score", "rows", "within class and bin", "by bin", "overall"}}
	add := func(name string, rows int, level *RequestLevel) {
		within := "-"
		if level.Within != nil {
			within = text(*level.Within, 2)
		}
		byBin := make([]string, len(level.ByBin))
		for i, b := range level.ByBin {
			byBin[i] = optional(b.Within)
		}
		table = append(table, []string{
			name, strconv.Itoa(rows), within, strings.Join(byBin, " / "), optional(level.Overall),
		})
	}
	for _, s := range r.Scores {
		add(s.Settings, s.Rows, s.RequestLevel)
		if s.hasControl() {
			add("  its mean distance", s.Rows, s.MeanDistance.RequestLevel)
		}
	}
	return table
}

// text returns an estimate with its interval.
func text(e Estimate, digits int) string {
	return fmt.Sprintf("%.*f [%.*f, %.*f]", digits, e.Value, digits, e.Low, digits, e.High)
}

// optional returns two digits, or - for nil.
func optional(v *float64) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf("%.2f", *v)
}

func printTable(w io.Writer, rows [][]string) error {
	out := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(out, strings.Join(row, "\t"))
	}
	return out.Flush()
}

package evaluation

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/decuwatch/decuwatch/internal/terminal"
)

// Print writes the results as text: the tables of each ensemble, then several ensembles side by side.
func (r *Results) Print(w io.Writer) error {
	for i := range r.Ensembles {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := r.Ensembles[i].print(w, r.Seeds); err != nil {
			return err
		}
	}
	if len(r.SideBySide) == 0 {
		return nil
	}
	fmt.Fprint(w, "\nSide by side: spread is the largest less the smallest.\n\n")
	return printTable(w, r.sideBySideTable())
}

func (r *Ensemble) print(w io.Writer, seeds int) error {
	cells := len(r.Manifests) * r.Classes
	fmt.Fprintf(w, "%s (%s, regime %s): %d rotations x %d classes x %d seeds = %d requests of each score;\n"+
		"95%% intervals over %d cells.\n\n", terminal.Printable(r.Path), r.Name, r.Regime, len(r.Manifests), r.Classes, seeds,
		r.Requests, cells)
	if err := printTable(w, r.profileTable()); err != nil {
		return err
	}
	for _, part := range []func(io.Writer) error{r.printRequests, r.printClasses, r.printImages, r.printAlarms} {
		fmt.Fprintln(w)
		if err := part(w); err != nil {
			return err
		}
	}
	return nil
}

// profileTable says what the scores are.
func (r *Ensemble) profileTable() [][]string {
	table := [][]string{{"score", "what", "rows", "saturated", "not measured"}}
	for _, s := range r.Scores {
		table = append(table, []string{r.scoreName(s), s.Settings, strconv.Itoa(s.Rows), percent(s.Saturated),
			strconv.Itoa(r.Requests - s.Measured)})
	}
	for i, p := range r.Profiles {
		name := "all"
		if len(r.Profiles) > 1 {
			name = fmt.Sprintf("all (%d)", i+1)
		}
		guidance, _, _ := strings.Cut(p.Settings, " class_gap")
		table = append(table, []string{name, guidance, strconv.Itoa(p.Rows), "", ""})
	}
	return table
}

func (r *Ensemble) printRequests(w io.Writer) error {
	fmt.Fprint(w, "Request level: does the score rank the requests of a class by their error?\n")
	if r.Error == nil {
		_, err := fmt.Fprintln(w, "Unknown: the tables file has no tensor \"reference\", "+
			"and without the fully trained table no request's error is known.")
		return err
	}
	if r.Error.Producer == nil {
		fmt.Fprintln(w, "The tables file has no tensor \"producers\". "+
			"So only the figure against the score's own members is known.")
	}
	fmt.Fprintln(w)
	if err := printTable(w, r.requestTable()); err != nil {
		return err
	}
	if r.Error.Producer != nil {
		fmt.Fprintf(w, "\nError: squared distance of the final latent of a producer, which is not a member, to the final "+
			"latent\nunder the fully trained table; %d steps, guidance %g; mean by bin %s.\n",
			r.Error.Steps, r.Error.Guidance, binText(r.Error.Producer))
	}
	_, err := fmt.Fprintf(w, "\"own members (old)\": the error averaged over the members, as earlier versions measured. "+
		"It flatters scores\nthat the same members give; %d steps, guidance %g; mean by bin %s.\n",
		r.Error.Steps, r.Error.Guidance, binText(r.Error.Members))
	return err
}

func (r *Ensemble) requestTable() [][]string {
	table := [][]string{{"score", "rows", "within class and bin", "of ceiling", "by bin", "overall", "own members (old)"}}
	add := func(name string, rows int, level, members *RequestLevel) {
		line := []string{name, strconv.Itoa(rows), "-", "-", "-", "-", "-"}
		if level != nil {
			byBin := make([]string, len(r.Bins))
			for i, bin := range r.Bins {
				byBin[i] = "-"
				if k := slices.IndexFunc(level.ByBin, func(b BinWithin) bool { return b.Bin == bin }); k >= 0 {
					byBin[i] = optional(level.ByBin[k].Within)
				}
			}
			line[2], line[4], line[5] = within(level), strings.Join(byBin, " / "), optional(level.Overall)
			if r.Ceiling != nil && r.Ceiling.Within != nil && level.Within != nil {
				line[3] = fmt.Sprintf("%.2f", level.Within.Value/r.Ceiling.Within.Value)
			}
		}
		if members != nil {
			line[6] = within(members)
		}
		table = append(table, line)
	}
	for _, s := range r.Scores {
		add(r.scoreName(s), s.Rows, s.RequestLevel, s.MembersLevel)
		for i, m := range s.ByMembers {
			if i < len(s.ByMembers)-1 { // the last is all members
				add(fmt.Sprintf("  mean distance of %d", m.Members), m.Rows, m.RequestLevel, m.MembersLevel)
			}
		}
		if s.MeanDistance != nil {
			add("  its mean distance", s.Rows, s.MeanDistance.RequestLevel, s.MeanDistance.MembersLevel)
		}
	}
	for _, c := range r.Controls {
		add(c.Name, 0, c.RequestLevel, c.MembersLevel)
	}
	if r.Ceiling != nil {
		add("a second producer's error", 0, r.Ceiling, nil)
	}
	return table
}

func within(level *RequestLevel) string {
	if level.Within == nil {
		return "-"
	}
	return text(*level.Within, 2)
}

func (r *Ensemble) printClasses(w io.Writer) error {
	fmt.Fprint(w, "Class level: does the score find under-sampled classes?\n\n")
	if err := printTable(w, r.classTable()); err != nil {
		return err
	}
	fmt.Fprintf(w, "\nMean by bin:\n\n")
	return printTable(w, r.meanTable())
}

func (r *Ensemble) classTable() [][]string {
	table := [][]string{{"score", "rows", "bin", "AUROC", "AUPRC", "TPR at 1% FPR", "same class", "rho"}}
	r.each(func(name string, rows int, l Levels) {
		table = append(table, classRows(name, strconv.Itoa(rows), l.ClassLevel)...)
	})
	return table
}

// each calls add with every score, its mean distance, and every control.
func (r *Ensemble) each(add func(name string, rows int, l Levels)) {
	for _, s := range r.Scores {
		add(r.scoreName(s), s.Rows, s.Levels)
		if s.MeanDistance != nil {
			add("  its mean distance", s.Rows, *s.MeanDistance)
		}
	}
	for _, c := range r.Controls {
		add(c.Name, 0, c.Levels)
	}
}

// classRows returns a row for each bin but the largest; only the first says what the bins have in common.
func classRows(name, rows string, level ClassLevel) [][]string {
	line := []string{name, rows, "-", "-", "-", "-", "-", optional(level.Rho)}
	if len(level.Against) == 0 {
		return [][]string{line}
	}
	var table [][]string
	for _, a := range level.Against {
		same := "-"
		if a.SameClass != nil {
			same = fmt.Sprintf("%.3f (%d of %d)", *a.SameClass, a.ClassesAt, a.Classes)
		}
		copy(line[2:], []string{
			fmt.Sprintf("%g v %g", a.Bin, level.largest()), text(a.AUROC, 3), fmt.Sprintf("%.3f", a.AUPRC),
			fmt.Sprintf("%.2f", a.TPR), same,
		})
		table = append(table, slices.Clone(line))
		line[0], line[1], line[7] = "", "", ""
	}
	return table
}

func (r *Ensemble) meanTable() [][]string {
	header := []string{"score"}
	for _, bin := range r.Bins {
		header = append(header, fmt.Sprintf("%g", bin))
	}
	table := [][]string{header}
	for _, s := range r.Scores {
		line := make([]string, len(header))
		line[0] = r.scoreName(s)
		for _, m := range s.ClassLevel.Means {
			line[1+slices.Index(r.Bins, m.Bin)] = fmt.Sprintf("%.3g", m.Mean.Value)
		}
		table = append(table, line)
	}
	return table
}

func (r *Ensemble) printImages(w io.Writer) error {
	fmt.Fprint(w, "Image level: does the score find images that are not of the class asked for?\n")
	if len(r.Truths) == 0 {
		_, err := fmt.Fprintln(w, "Unknown: no judge was named that says which images are wrong, or there are no producers.")
		return err
	}
	for i, seen := range r.Truths {
		fmt.Fprintf(w, "\nTruth %d, on the images of a producer: %s (%.12s)\n%s.\n", i+1, terminal.Printable(seen.Judge),
			seen.Digest, terminal.Printable(strings.TrimSuffix(seen.Measured, ".")))
		fmt.Fprintf(w, "%d of %d requests have a class that truth and judge can tell; share of wrong images by bin %s.\n\n",
			seen.Requests, r.Requests, binText(seen.Wrong))
		if err := printTable(w, r.imageTable(i)); err != nil {
			return err
		}
	}
	return nil
}

func (r *Ensemble) imageTable(truth int) [][]string {
	table := [][]string{{"score", "rows", "AUROC", "AUPRC", "TPR at 5% FPR", "AUROC within class and bin", "cells"}}
	add := func(name string, rows int, level ImageLevel) {
		line := []string{name, strconv.Itoa(rows), "-", optional(level.AUPRC), optional(level.TPR), "-",
			strconv.Itoa(level.Cells)}
		if level.AUROC != nil {
			line[2] = text(*level.AUROC, 3)
		}
		if level.Within != nil {
			line[5] = text(*level.Within, 2)
		}
		table = append(table, line)
	}
	r.each(func(name string, rows int, l Levels) { add(name, rows, l.ImageLevels[truth]) })
	if c := r.Truths[truth].Ceiling; c != nil {
		add("judge on the image itself", 0, *c)
	}
	return table
}

func (r *Ensemble) printAlarms(w io.Writer) error {
	fmt.Fprintf(w, "False alarms: calibrated at %s on one half of the requests, counted on the other half, of classes "+
		"whose scores\nare in the calibration. In brackets: the rates that 95%% of such counts have if all is well.\n\n",
		percent(r.Alarms[0].Alpha))
	header := []string{"class"}
	for _, s := range r.Scores {
		header = append(header, r.scoreName(s))
	}
	table := [][]string{header, r.alarmRow("all", func(f FalseAlarms) AlarmRate { return f.All })}
	for i, class := range r.Alarms[0].Classes {
		if slices.ContainsFunc(r.Alarms, func(f FalseAlarms) bool { return f.Classes[i].Scores > 0 }) {
			table = append(table, r.alarmRow(terminal.Printable(class.Label),
				func(f FalseAlarms) AlarmRate { return f.Classes[i] }))
		}
	}
	if err := printTable(w, table); err != nil {
		return err
	}
	for i, f := range r.Alarms {
		if f.Reason != "" {
			fmt.Fprintf(w, "%s: not calibrated in some rotation: %s.\n", r.scoreName(r.Scores[i]), f.Reason)
		}
	}
	return nil
}

func (r *Ensemble) alarmRow(name string, rate func(FalseAlarms) AlarmRate) []string {
	line := []string{name}
	for _, f := range r.Alarms {
		a := rate(f)
		if a.Scores == 0 {
			line = append(line, "-")
			continue
		}
		share := func(n int) string { return fmt.Sprintf("%.1f", 100*float64(n)/float64(a.Scores)) }
		line = append(line, fmt.Sprintf("%s%% of %d [%s, %s]", share(a.Alerts), a.Scores, share(a.Low), share(a.High)))
	}
	return line
}

func (r *Results) sideBySideTable() [][]string {
	header := []string{"figure"}
	for _, e := range r.Ensembles {
		header = append(header, terminal.Printable(e.Path))
	}
	table := [][]string{append(header, "mean", "spread")}
	digits := func(v *float64) string {
		if v == nil {
			return "-"
		}
		return fmt.Sprintf("%.3f", *v)
	}
	for _, f := range r.SideBySide {
		line := []string{f.Name}
		for _, v := range f.Values {
			line = append(line, digits(v))
		}
		table = append(table, append(line, digits(f.Mean), digits(f.Spread)))
	}
	return table
}

// binText returns the means of all bins.
func binText(means []BinMean) string {
	parts := make([]string, len(means))
	for i, m := range means {
		parts[i] = fmt.Sprintf("%.3g", m.Mean.Value)
	}
	return strings.Join(parts, " / ")
}

// percent returns a share in percent.
func percent(share float64) string { return fmt.Sprintf("%.3g%%", 100*share) }

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

package demo

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/watch"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// classSummary is what became of the requests of one class.
type classSummary struct {
	index             int
	requests, alerted int
	alerts            int // a request may raise one for each measurement
	sums, counts      map[schema.MeasurementName]float64
}

// mean returns the mean of a measurement; false if no request has it.
func (c *classSummary) mean(of schema.MeasurementName) (float64, bool) {
	return c.sums[of] / c.counts[of], c.counts[of] > 0
}

// gap returns the mean class gap, which every request has.
func (c *classSummary) gap() float64 {
	gap, _ := c.mean(schema.ClassGap)
	return gap
}

// summary prints the table of the classes and the last alerts.
func (d *demo) summary(ctx context.Context, events []schema.Event, took time.Duration) error {
	classes, rows, err := d.classes(ctx, events)
	if err != nil {
		return err
	}
	table, err := alerts.ReadTable(ctx, d.store)
	if err != nil {
		return err
	}
	alerted, raised := 0, 0
	for _, c := range classes {
		alerted += c.alerted
		raised += c.alerts
	}
	fmt.Fprintf(d.Out, "\n%d requests in %.1f s: %.0f requests/s, %.0f rows of U-Net work/s; %d of the requests "+
		"raised %d alerts\n\n",
		len(events), took.Seconds(), float64(len(events))/took.Seconds(), float64(rows)/took.Seconds(), alerted, raised)
	if err := d.printClasses(classes, table); err != nil {
		return err
	}
	last, err := d.store.Alerts(ctx, postgres.AlertFilter{Model: d.ensemble.Name, Limit: 5})
	if err != nil {
		return err
	}
	if len(last) > 0 {
		fmt.Fprintf(d.Out, "\nThe last alerts:\n")
	}
	for _, a := range slices.Backward(last) {
		fmt.Fprintln(d.Out, watch.Line(a, d.Colour))
	}
	return nil
}

// classes returns the classes that have requests, those with the highest class gap first, and the rows of all requests.
func (d *demo) classes(ctx context.Context, events []schema.Event) (list []classSummary, rows int, err error) {
	list = make([]classSummary, len(d.ensemble.Classes))
	for _, e := range events {
		header, payload, err := schema.Encode(e)
		if err != nil {
			return nil, 0, err
		}
		recorded, found, err := d.store.Lookup(ctx, e.Identity(), schema.Digest(header, payload))
		if err != nil {
			return nil, 0, err
		}
		if !found || recorded.Score == nil {
			return nil, 0, fmt.Errorf("request %s was not scored: %s %s", e.ID, recorded.Outcome, recorded.Reason)
		}
		c := &list[recorded.Score.ClassIndex]
		c.index = recorded.Score.ClassIndex
		c.requests++
		if c.sums == nil {
			c.sums, c.counts = map[schema.MeasurementName]float64{}, map[schema.MeasurementName]float64{}
		}
		for _, m := range recorded.Score.Measurements() {
			c.sums[m.Name] += m.Value
			c.counts[m.Name]++
		}
		rows += recorded.Score.Receipt.Rows
		if len(recorded.AlertIDs) > 0 {
			c.alerted++
		}
		c.alerts += len(recorded.AlertIDs)
	}
	list = slices.DeleteFunc(list, func(c classSummary) bool { return c.requests == 0 })
	slices.SortStableFunc(list, func(a, b classSummary) int { return cmp.Compare(b.gap(), a.gap()) })
	return list, rows, nil
}

// printClasses prints one line for each class, with a bar beside the class gap.
func (d *demo) printClasses(classes []classSummary, table *alerts.Table) error {
	const width = 14
	bound := func(measurement schema.MeasurementName, class int) string { // the lowest that raises an alert
		list := table.Applicable(app.SeriesOf(d.ensemble), measurement, class).All()
		if len(list) == 0 {
			return "-"
		}
		lowest := slices.MinFunc(list, func(a, b *schema.Threshold) int { return cmp.Compare(a.Value, b.Value) })
		return fmt.Sprintf("%.4f", lowest.Value)
	}
	fmt.Fprintln(d.Out, "Means by class. An alert fires at the value in the column \"from\" after a measurement. "+
		"alerted: requests with an alert.")
	w := tabwriter.NewWriter(d.Out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "class\timages\trequests\t")
	for _, name := range schema.MeasurementNames() {
		fmt.Fprintf(w, "%s\tfrom\t", strings.ReplaceAll(string(name), "_", " "))
	}
	fmt.Fprintln(w, "alerted\t")
	for _, c := range classes {
		class := d.ensemble.Classes[c.index]
		fmt.Fprintf(w, "%s\t%s\t%d\t", terminal.Printable(class.Label), class.ImageCount(), c.requests)
		for _, name := range schema.MeasurementNames() {
			value := "-"
			if mean, measured := c.mean(name); measured {
				value = fmt.Sprintf("%.4f", mean)
			}
			if name == schema.ClassGap {
				n := max(1, int(math.Round(c.gap()/classes[0].gap()*width)))
				value = strings.Repeat(" ", width-n) + strings.Repeat("█", n) + "  " + value
			}
			fmt.Fprintf(w, "%s\t%s\t", value, bound(name, c.index))
		}
		fmt.Fprintf(w, "%d\t\n", c.alerted)
	}
	return w.Flush()
}

// addresses prints where everything is, and what to try next.
func (d *demo) addresses(log string) {
	program := "decuwatch"
	if exe, err := os.Executable(); err == nil {
		program = exe
		if wd, err := os.Getwd(); err == nil {
			if relative, err := filepath.Rel(wd, exe); err == nil && !strings.HasPrefix(relative, "..") {
				program = relative
			}
		}
	}
	fmt.Fprintf(d.Out, "\n")
	w := tabwriter.NewWriter(d.Out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "NATS\t%s\n", d.broker.ClientURL())
	fmt.Fprintf(w, "metrics\thttp://%s/metrics, /healthz, /readyz\n", d.up.Metrics)
	if d.up.Review != "" {
		fmt.Fprintf(w, "review\thttp://%s/\n", d.up.Review)
	}
	fmt.Fprintf(w, "Postgres\t%s\n", settings.Redact(d.database.URL()))
	fmt.Fprintf(w, "log\t%s\n", log)
	_ = w.Flush() // to the same place as everything else
	fmt.Fprintf(d.Out, "\nAsk the database:\n  psql '%s' -c 'SELECT class_label, count(*), "+
		"round(avg(class_gap)::numeric, 4) AS class_gap FROM decuwatch_views.scores GROUP BY 1 ORDER BY 3 DESC'\n",
		d.database.URL())
	nats := ""
	if u, err := url.Parse(d.broker.ClientURL()); err == nil && u.Port() != "4222" {
		nats = " --nats.url " + d.broker.ClientURL()
	}
	fmt.Fprintf(d.Out, "Publish another request:\n  %s publish --model %s --class 0 --seed 42%s\n",
		program, d.ensemble.Name, nats)
	fmt.Fprintf(d.Out, "Follow alerts:\n  %s watch%s\n", program, nats)
}

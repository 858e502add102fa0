// Package compare holds the scores of two ensembles on the same events against each other: how alike they rank
// requests, and which alerts appear and disappear if the second takes over.
package compare

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring/evaluation"
)

// most is how many of the requests that differ most are reported.
const most = 20

// Comparison gathers the pairs of scores.
type Comparison struct {
	series     [2]schema.Series
	table      *alerts.Table
	events     []event
	values     map[schema.MeasurementName]*pairs
	classes    map[int]*Class
	thresholds [2]map[schema.MeasurementName]bool // that no score lacked
}

// event is an event that both scored.
type event struct {
	source, id string
	time       time.Time
	class      int
	label      string
	alerted    [2]bool
}

// pairs are the values of one measurement, of the events that both measured.
type pairs struct {
	events []int // indexes of Comparison.events
	values [2][]float64
}

// New returns a comparison of no events yet. Alerts are decided by the thresholds of the table.
func New(before, after schema.Series, table *alerts.Table) *Comparison {
	return &Comparison{
		series: [2]schema.Series{before, after}, table: table, values: map[schema.MeasurementName]*pairs{},
		classes: map[int]*Class{}, thresholds: [2]map[schema.MeasurementName]bool{{}, {}},
	}
}

// Add adds the two scores of an event.
func (c *Comparison) Add(before, after *schema.Score) {
	e := event{source: before.Event.Source, id: before.Event.ID, time: before.Event.Time, class: before.ClassIndex,
		label: before.ClassLabel}
	measured := [2]map[schema.MeasurementName]float64{{}, {}}
	for i, s := range []*schema.Score{before, after} {
		d := alerts.Decide(*s, c.table)
		e.alerted[i] = len(d.Alerts) > 0
		for _, f := range d.Findings {
			has := f.Fallback != alerts.FallbackMissing && f.Fallback != alerts.FallbackStale
			if known, seen := c.thresholds[i][f.Measurement]; !seen || known {
				c.thresholds[i][f.Measurement] = has
			}
		}
		for _, m := range s.Measurements() {
			measured[i][m.Name] = m.Value
		}
	}
	for name, value := range measured[0] {
		other, both := measured[1][name]
		if !both {
			continue
		}
		p := c.values[name]
		if p == nil {
			p = &pairs{}
			c.values[name] = p
		}
		p.events = append(p.events, len(c.events))
		p.values[0], p.values[1] = append(p.values[0], value), append(p.values[1], other)
	}
	c.events = append(c.events, e)
	class := c.classes[e.class]
	if class == nil {
		class = &Class{Class: e.class, Label: e.label}
		c.classes[e.class] = class
	}
	class.add(e.alerted)
}

// Result is a comparison. Before and After are the two series.
type Result struct {
	Before       schema.Series `json:"before"`
	After        schema.Series `json:"after"`
	Events       int           `json:"events"` // that both scored
	Measurements []Measurement `json:"measurements"`
	Classes      []Class       `json:"classes"`
	Total        Class         `json:"total"`    // of all classes; Class is -1
	Requests     []Request     `json:"requests"` // that differ most, the most different first
}

// Measurement compares one measurement.
type Measurement struct {
	Name schema.MeasurementName `json:"name"`
	N    int                    `json:"n"` // events on which both measured it
	// Spearman's rank correlation over all events; nil if one of the two is constant.
	Rank *float64 `json:"rank_correlation"`
	// Mean of the rank correlation within each class, weighed by its events; nil if it is defined in no class.
	Within *float64 `json:"rank_correlation_within_class"`
	// Whether a threshold decides on every score.
	ThresholdsBefore bool `json:"thresholds_before"`
	ThresholdsAfter  bool `json:"thresholds_after"`
}

// Class counts the requests of a class that raise an alert.
type Class struct {
	Class     int    `json:"class"`
	Label     string `json:"label"`
	Events    int    `json:"events"`
	Before    int    `json:"alerts_before"`
	After     int    `json:"alerts_after"`
	Appear    int    `json:"appear"`
	Disappear int    `json:"disappear"`
}

func (c *Class) add(alerted [2]bool) {
	count := func(n *int, is bool) {
		if is {
			*n++
		}
	}
	c.Events++
	count(&c.Before, alerted[0])
	count(&c.After, alerted[1])
	count(&c.Appear, !alerted[0] && alerted[1])
	count(&c.Disappear, alerted[0] && !alerted[1])
}

// Request is an event whose rank among all differs.
type Request struct {
	Source      string                 `json:"source"`
	ID          string                 `json:"id"`
	Time        time.Time              `json:"time"`
	Class       int                    `json:"class"`
	Label       string                 `json:"label"`
	Measurement schema.MeasurementName `json:"measurement"` // that differs most
	Before      float64                `json:"before"`
	After       float64                `json:"after"`
	RankBefore  float64                `json:"rank_before"` // 0 is the lowest of all events, 1 the highest
	RankAfter   float64                `json:"rank_after"`
	AlertBefore bool                   `json:"alert_before"`
	AlertAfter  bool                   `json:"alert_after"`
}

func (r Request) difference() float64 { return math.Abs(r.RankAfter - r.RankBefore) }

// Result returns the comparison of what was added.
func (c *Comparison) Result() *Result {
	r := &Result{
		Before: c.series[0], After: c.series[1], Events: len(c.events), Measurements: []Measurement{}, Classes: []Class{},
		Total: Class{Class: -1, Label: "all"}, Requests: []Request{},
	}
	furthest := map[int]Request{} // by event
	for _, name := range schema.MeasurementNames() {
		p := c.values[name]
		if p == nil {
			continue
		}
		r.Measurements = append(r.Measurements, Measurement{
			Name: name, N: len(p.events), Rank: correlation(p.values[0], p.values[1]), Within: c.within(p),
			ThresholdsBefore: c.thresholds[0][name], ThresholdsAfter: c.thresholds[1][name],
		})
		for _, request := range c.requests(name, p) {
			if known, ok := furthest[request.event]; !ok || request.difference() > known.difference() {
				furthest[request.event] = request.Request
			}
		}
	}
	for _, index := range slices.Sorted(maps.Keys(c.classes)) {
		r.Classes = append(r.Classes, *c.classes[index])
	}
	for _, e := range c.events {
		r.Total.add(e.alerted)
	}
	r.Requests = slices.SortedFunc(maps.Values(furthest), func(a, b Request) int {
		return cmp.Or(cmp.Compare(b.difference(), a.difference()), a.Time.Compare(b.Time),
			strings.Compare(a.Source, b.Source), strings.Compare(a.ID, b.ID))
	})
	r.Requests = slices.DeleteFunc(r.Requests, func(r Request) bool { return r.difference() == 0 })
	r.Requests = r.Requests[:min(most, len(r.Requests))]
	return r
}

// correlation returns Spearman's rank correlation, or nil if it is not defined.
func correlation(a, b []float64) *float64 {
	rho := evaluation.Spearman(a, b)
	if math.IsNaN(rho) {
		return nil
	}
	return &rho
}

// within returns the mean rank correlation within the classes.
func (c *Comparison) within(p *pairs) *float64 {
	classes := map[int]*pairs{}
	for i, e := range p.events {
		class := c.events[e].class
		if classes[class] == nil {
			classes[class] = &pairs{}
		}
		of := classes[class]
		of.values[0], of.values[1] = append(of.values[0], p.values[0][i]), append(of.values[1], p.values[1][i])
	}
	sum, n := 0.0, 0
	for _, of := range classes {
		if rho := correlation(of.values[0], of.values[1]); rho != nil {
			sum, n = sum+*rho*float64(len(of.values[0])), n+len(of.values[0])
		}
	}
	if n == 0 {
		return nil
	}
	mean := sum / float64(n)
	return &mean
}

// ranked is a request, and the index of its event.
type ranked struct {
	Request
	event int
}

// requests returns the requests with their ranks by one measurement.
func (c *Comparison) requests(name schema.MeasurementName, p *pairs) []ranked {
	if len(p.events) < 2 {
		return nil
	}
	ranks := [2][]float64{evaluation.Ranks(p.values[0]), evaluation.Ranks(p.values[1])}
	list := make([]ranked, len(p.events))
	for i, index := range p.events {
		e := c.events[index]
		place := func(of int) float64 { return (ranks[of][i] - 1) / float64(len(p.events)-1) }
		list[i] = ranked{Request{
			Source: e.source, ID: e.id, Time: e.time, Class: e.class, Label: e.label, Measurement: name,
			Before: p.values[0][i], After: p.values[1][i], RankBefore: place(0), RankAfter: place(1),
			AlertBefore: e.alerted[0], AlertAfter: e.alerted[1],
		}, index}
	}
	return list
}

// Lacking returns the measurements on which a threshold decides before, and none decides on every score after.
func (r *Result) Lacking() (list []schema.MeasurementName) {
	for _, m := range r.Measurements {
		if m.ThresholdsBefore && !m.ThresholdsAfter {
			list = append(list, m.Name)
		}
	}
	return list
}

// Print writes the comparison as text.
func (r *Result) Print(out io.Writer) error {
	fmt.Fprintf(out, "%d events of %s that both scored\nbefore  %s (%s)\nafter   %s (%s)\n\n", r.Events, r.Before.Model,
		r.Before.EnsembleDigest, r.Before.Settings, r.After.EnsembleDigest, r.After.Settings)
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "measurement\tevents\trank correlation\twithin classes\tthresholds before\tafter")
	for _, m := range r.Measurements {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", m.Name, m.N, number(m.Rank), number(m.Within),
			yes(m.ThresholdsBefore), yes(m.ThresholdsAfter))
	}
	fmt.Fprintln(w, "\t\t\t\t\t\nclass\tevents\talerts before\tafter\tappear\tdisappear")
	for _, c := range append(slices.Clone(r.Classes), r.Total) {
		name := "all"
		if c.Class >= 0 {
			name = fmt.Sprintf("%d %s", c.Class, terminal.Printable(c.Label))
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\n", name, c.Events, c.Before, c.After, c.Appear, c.Disappear)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(r.Requests) > 0 {
		fmt.Fprintf(out, "\nRequests that differ most (rank: 0 is the lowest of all, 1 the highest)\n")
	}
	w = tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	for i, q := range r.Requests {
		if i == 0 {
			fmt.Fprintln(w, "rank before\tafter\talert before\tafter\tmeasurement\tbefore\tafter\tclass\tid\tsource")
		}
		fmt.Fprintf(w, "%.3f\t%.3f\t%s\t%s\t%s\t%.4g\t%.4g\t%d %s\t%s\t%s\n", q.RankBefore, q.RankAfter,
			yes(q.AlertBefore), yes(q.AlertAfter), q.Measurement, q.Before, q.After, q.Class,
			terminal.Printable(q.Label), terminal.Printable(q.ID), terminal.Printable(q.Source))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, name := range r.Lacking() {
		fmt.Fprintf(out, "\nNo threshold decides on %s after the switch: run decuwatch thresholds calibrate first.\n", name)
	}
	return nil
}

func number(x *float64) string {
	if x == nil {
		return "-"
	}
	return fmt.Sprintf("%.4f", *x)
}

func yes(is bool) string {
	if is {
		return "yes"
	}
	return "no"
}

// Lines returns the comparison as lines of JSON. The field kind says what each is: comparison, measurement, class
// (and one of all classes), request.
func (r *Result) Lines() []any {
	lines := []any{struct {
		Kind   string        `json:"kind"`
		Before schema.Series `json:"before"`
		After  schema.Series `json:"after"`
		Events int           `json:"events"`
	}{"comparison", r.Before, r.After, r.Events}}
	for _, m := range r.Measurements {
		lines = append(lines, struct {
			Kind string `json:"kind"`
			Measurement
		}{"measurement", m})
	}
	for _, c := range append(slices.Clone(r.Classes), r.Total) {
		lines = append(lines, struct {
			Kind string `json:"kind"`
			Class
		}{"class", c})
	}
	for _, q := range r.Requests {
		lines = append(lines, struct {
			Kind string `json:"kind"`
			Request
		}{"request", q})
	}
	return lines
}

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os/user"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/calibration"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// week is the time over which a plan counts alerts.
const week = 7 * 24 * time.Hour

type thresholdsCalibrateCmd struct {
	Ensemble    string                 `arg:"" help:"Ensemble whose scores are read: a directory, or a manifest."`
	Measurement schema.MeasurementName `required:"" enum:"class_gap,request_risk" placeholder:"class_gap|request_risk" help:"Number that is held against the thresholds."`
	Alpha       float64                `required:"" help:"False-alarm rate that is wished for, between 0 and 1: the share of usual requests that may alert."`
	Severity    schema.Severity        `default:"warn" enum:"warn,critical" help:"warn or critical."`
	Window      time.Duration          `default:"720h" help:"Scores of so long before --to are read."`
	To          *time.Time             `placeholder:"TIME" help:"End of the window of event time, RFC 3339. Defaults to now."`
	Pool        string                 `default:"well-sampled" enum:"well-sampled,all" help:"Classes whose scores make the model's threshold: those with the most training images, or all."`
	LimitAlpha  float64                `placeholder:"RATE" help:"Also set an absolute limit, which no class may pass, at this rate of the same pool. Defaults to none."`
	Manual      bool                   `name:"replace-manual" help:"Also replace thresholds that were set by hand."`
	Settings    string                 `placeholder:"KEY" help:"Settings of the scores, as a receipt has them. Defaults to the ensemble's fixed profile."`
	Apply       bool                   `help:"Set the thresholds. Without it the plan is printed only."`
	Reason      string                 `help:"Why, for the history. Needed with --apply."`
	By          string                 `placeholder:"NAME" help:"Who sets them. Defaults to the user who runs this."`
	JSON        bool                   `name:"json" help:"Print the plan as JSON."`

	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (thresholdsCalibrateCmd) Help() string {
	return `Reads stored scores and finds thresholds with a known false-alarm rate by conformal p-values: for each class that has scores enough (alpha takes 1/alpha - 1 of them), else for its cluster of classes with similar scores, else for the model. Prints the plan; nothing changes without --apply.

Examples:

  decuwatch thresholds calibrate ensembles/fashion-mnist --measurement request_risk --alpha 0.01
  decuwatch thresholds calibrate ensembles/fashion-mnist --measurement class_gap --alpha 0.01 --limit-alpha 0.001 --apply --reason "first month"`
}

// calibrationPlan is what a calibration would change.
type calibrationPlan struct {
	Model          string                 `json:"model"`
	EnsembleDigest string                 `json:"ensemble_digest"`
	Settings       string                 `json:"settings"`
	Measurement    schema.MeasurementName `json:"measurement"`
	Severity       schema.Severity        `json:"severity"`
	Alpha          float64                `json:"alpha"`
	WindowFrom     time.Time              `json:"window_from"`
	WindowTo       time.Time              `json:"window_to"`
	Scores         int                    `json:"scores"`
	Classes        []calibrationLine      `json:"classes"` // the model first, then each class
	WeekScores     int                    `json:"week_scores"`
	AlertsOld      int                    `json:"alerts_old"` // in the last week, had the old thresholds stood all the time
	AlertsNew      int                    `json:"alerts_new"`
	Applied        int64                  `json:"applied_change,omitempty"`

	set   []schema.Threshold
	aside []*aside // thresholds of the other severity that do not apply to some classes
}

// calibrationLine is what a plan says about the model or one class.
type calibrationLine struct {
	Class    *int         `json:"class,omitempty"` // nil for the model
	Label    string       `json:"label"`
	Scores   int          `json:"scores"`
	Missing  int          `json:"missing"`   // scores that a threshold of the class's own would take more
	Old      *float64     `json:"old"`       // value that decides now
	OldScope schema.Scope `json:"old_scope"` // "" where none does
	New      *float64     `json:"new"`
	NewScope schema.Scope `json:"new_scope"` // "" if no threshold of the severity decides
	Deciding schema.Scope `json:"deciding"`  // scope that decides then, with thresholds of whichever severity
	Cluster  []int        `json:"cluster,omitempty"`

	SetAside  []schema.Threshold `json:"set_aside,omitempty"` // wider thresholds that do not apply to the class then
	N         int                `json:"n"`
	Achieved  float64            `json:"achieved"`
	AlertsOld int                `json:"alerts_old"`
	AlertsNew int                `json:"alerts_new"`
	Kept      bool               `json:"kept,omitempty"` // a threshold that was set by hand stays
}

func (c *thresholdsCalibrateCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	switch {
	case !(c.Alpha > 0 && c.Alpha < 1):
		return usage("--alpha is %g, must lie between 0 and 1", c.Alpha)
	case c.LimitAlpha != 0 && !(c.LimitAlpha > 0 && c.LimitAlpha < 1):
		return usage("--limit-alpha is %g, must lie between 0 and 1", c.LimitAlpha)
	case c.Window <= 0:
		return usage("--window is %s, must be more than 0", c.Window)
	case c.Apply && strings.TrimSpace(c.Reason) == "":
		return usage("--apply needs a --reason for the history")
	}
	e, err := ensemble.Open(c.Ensemble)
	if err != nil {
		return err
	}
	store, err := c.Postgres.Open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()
	plan, err := c.plan(ctx, store, e)
	if err != nil {
		return err
	}
	if c.Apply {
		change, err := store.SetThresholds(ctx, postgres.ThresholdChange{
			Kind: postgres.ChangeCalibration, SetBy: by(c.By), Reason: strings.TrimSpace(c.Reason), Thresholds: plan.set,
		})
		if err != nil {
			return err
		}
		plan.Applied = change.ID
	}
	if c.JSON {
		return writeJSON(s.out, plan)
	}
	return plan.print(s.out)
}

// plan reads the scores and finds what would change.
func (c *thresholdsCalibrateCmd) plan(ctx context.Context, store *postgres.Store, e *ensemble.Ensemble) (*calibrationPlan, error) {
	to := time.Now().UTC().Truncate(time.Microsecond)
	if c.To != nil {
		to = c.To.UTC().Truncate(time.Microsecond)
	}
	p := &calibrationPlan{
		Model: e.Name, EnsembleDigest: e.Digest, Settings: c.Settings, Measurement: c.Measurement, Severity: c.Severity, Alpha: c.Alpha,
		WindowFrom: to.Add(-c.Window), WindowTo: to,
	}
	if p.Settings == "" {
		p.Settings = e.Profile.Settings()
	}
	read := func(from, to time.Time) ([]schema.Sample, error) {
		return store.Samples(ctx, p.series(), p.Measurement, from, to)
	}
	samples, err := read(p.WindowFrom, p.WindowTo)
	if err != nil {
		return nil, err
	}
	p.Scores = len(samples)
	if len(samples) == 0 {
		return nil, fmt.Errorf("there are no scores of model %s by ensemble %.12s under settings %q from %s to %s: nothing was changed",
			p.Model, p.EnsembleDigest, p.Settings, p.WindowFrom.Format(time.RFC3339), p.WindowTo.Format(time.RFC3339))
	}
	options := calibration.Options{Alpha: c.Alpha, Classes: len(e.Classes)}
	if c.Pool == "well-sampled" {
		options.WellSampled = e.WellSampled()
	}
	results, err := calibration.Calibrate(samples, options)
	if err != nil {
		return nil, fmt.Errorf("calibrate %s of model %s: %w; nothing was changed", p.Measurement, p.Model, err)
	}
	now, err := store.Thresholds(ctx)
	if err != nil {
		return nil, err
	}
	key := calibration.Key{Series: p.series(), Measurement: p.Measurement, Severity: p.Severity}
	p.set = c.thresholds(p, key, results, now)
	if c.LimitAlpha != 0 {
		limit, err := c.limit(p, samples, options)
		if err != nil {
			return nil, err
		}
		p.set = append(p.set, limit)
	}
	if err := schema.CheckChange(now, p.set); err != nil {
		return nil, fmt.Errorf("calibrate %s of model %s: %w; nothing was changed", p.Measurement, p.Model, err)
	}
	return p, p.describe(key, e, samples, results, now, func() ([]schema.Sample, error) { return read(to.Add(-week), to) })
}

// thresholds returns what the results set, and withdraws what a former calibration set for scopes that have no result
// now: it would decide instead of the wider scope.
func (c *thresholdsCalibrateCmd) thresholds(p *calibrationPlan, key calibration.Key, results []calibration.Result, now []schema.Threshold) []schema.Threshold {
	byHand := map[scopeKey]bool{}
	for _, t := range now {
		if key.Matches(t) && t.Origin == "manual" {
			byHand[scopeOf(t)] = true
		}
	}
	var set []schema.Threshold
	done := map[scopeKey]bool{}
	for _, r := range results {
		t := p.threshold(r.Scope, r.Bound, c.Alpha)
		if r.Class >= 0 {
			t.Class = &r.Class
		}
		if byHand[scopeOf(t)] && !c.Manual {
			continue
		}
		done[scopeOf(t)] = true
		set = append(set, t)
	}
	for _, t := range now {
		if key.Matches(t) && t.Scope != schema.ScopeLimit && !done[scopeOf(t)] && (t.Origin != "manual" || c.Manual) {
			t.Withdrawn = true
			set = append(set, t)
		}
	}
	return set
}

func (p *calibrationPlan) series() schema.Series {
	return schema.Series{Model: p.Model, EnsembleDigest: p.EnsembleDigest, Settings: p.Settings}
}

func (p *calibrationPlan) threshold(scope schema.Scope, b calibration.Bound, alpha float64) schema.Threshold {
	return schema.Threshold{
		Model: p.Model, EnsembleDigest: p.EnsembleDigest, Settings: p.Settings, Measurement: p.Measurement, Scope: scope, Severity: p.Severity,
		Value: b.Value, Distance: b.Distance, Origin: "calibrated", N: b.N, Alpha: &alpha, Achieved: &b.Achieved, WindowFrom: &p.WindowFrom, WindowTo: &p.WindowTo,
	}
}

// limit returns the absolute limit: critical, at a rate of its own of the pool that made the model's threshold.
func (c *thresholdsCalibrateCmd) limit(p *calibrationPlan, samples []schema.Sample, o calibration.Options) (schema.Threshold, error) {
	o.Alpha = c.LimitAlpha
	results, err := calibration.Calibrate(samples, o)
	if err != nil {
		return schema.Threshold{}, fmt.Errorf("absolute limit of %s: %w; nothing was changed", p.Measurement, err)
	}
	t := p.threshold(schema.ScopeLimit, results[0].Bound, c.LimitAlpha)
	t.Severity = schema.SeverityCritical
	return t, nil
}

// scopeKey is what thresholds of one key differ by.
type scopeKey struct {
	scope schema.Scope
	class int
}

func scopeOf(t schema.Threshold) scopeKey {
	if t.Class == nil {
		return scopeKey{t.Scope, -1}
	}
	return scopeKey{t.Scope, *t.Class}
}

// describe fills the lines of the plan.
func (p *calibrationPlan) describe(key calibration.Key, e *ensemble.Ensemble, samples []schema.Sample, results []calibration.Result,
	now []schema.Threshold, lastWeek func() ([]schema.Sample, error)) error {
	recent, err := lastWeek()
	if err != nil {
		return err
	}
	p.WeekScores = len(recent)
	// Ids order what replaces what; those of the plan are not known yet.
	const planned = int64(1) << 62
	then := slices.Clone(now)
	for i, t := range p.set {
		t.ID = planned + int64(i)
		then = append(then, t)
	}
	before, err := calibration.Count(recent, key, now)
	if err != nil {
		return err
	}
	after, err := calibration.Count(recent, key, then)
	if err != nil {
		return err
	}
	scores := map[int]int{}
	for _, s := range samples {
		scores[s.Class]++
	}
	old, err := alerts.NewTable(now)
	if err != nil {
		return err
	}
	set, err := alerts.NewTable(then)
	if err != nil {
		return err
	}
	// The table shows those of the plan's severity.
	p.aside = slices.DeleteFunc(setAside(set, e, key.Series, p.Measurement), func(a *aside) bool { return a.threshold.Severity == p.Severity })
	of := map[int]calibration.Result{}
	for _, r := range results {
		of[r.Class] = r
	}
	line := func(class int, label string) calibrationLine {
		r, own := of[class]
		if !own {
			r = of[-1]
		}
		l := calibrationLine{Label: label, Scores: scores[class], Missing: max(0, calibration.Needed(p.Alpha)-scores[class]), Cluster: r.Cluster, AlertsOld: before[class], AlertsNew: after[class]}
		if class >= 0 {
			l.Class = &class
		} else {
			l.Scores, l.Missing = r.Own, 0
		}
		if t := old.Applicable(key.Series, p.Measurement, class).Of(p.Severity); t != nil {
			l.Old, l.OldScope = &t.Value, t.Scope
		}
		applies := set.Applicable(key.Series, p.Measurement, class)
		l.Deciding = applies.Scope()
		for _, t := range set.SetAside(key.Series, p.Measurement, class) {
			th := *t
			if th.ID >= planned {
				th.ID = 0
			}
			l.SetAside = append(l.SetAside, th)
		}
		if t := applies.Of(p.Severity); t != nil {
			l.New, l.NewScope, l.N, l.Kept = &t.Value, t.Scope, t.N, t.Origin == "manual"
			if t.Achieved != nil {
				l.Achieved = *t.Achieved
			}
		}
		return l
	}
	p.Classes = append(p.Classes, line(-1, "(model)"))
	for class := range e.Classes {
		p.Classes = append(p.Classes, line(class, e.Classes[class].Label))
	}
	for _, n := range slices.Sorted(maps.Values(before)) {
		p.AlertsOld += n
	}
	for _, n := range slices.Sorted(maps.Values(after)) {
		p.AlertsNew += n
	}
	return nil
}

func (p *calibrationPlan) print(out io.Writer) error {
	fmt.Fprintf(out, "%s of %s (ensemble %.12s), %s at a false-alarm rate of %g, from %d scores of %s to %s\n\n", p.Measurement, p.Model, p.EnsembleDigest,
		p.Severity, p.Alpha, p.Scores, p.WindowFrom.Format(time.DateTime), p.WindowTo.Format(time.DateTime))
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "class\tscores\told\tfrom\tnew\tfrom\tn\trate\talerts last week: old\tnew\tremark")
	for _, l := range p.Classes {
		name := printable(l.Label)
		if l.Class != nil {
			name = fmt.Sprintf("%d %s", *l.Class, name)
		}
		old, oldScope := "-", "-"
		if l.Old != nil {
			old, oldScope = fmt.Sprintf("%.5g", *l.Old), string(l.OldScope)
		}
		value, scope := "-", "-"
		if l.New != nil {
			value, scope = fmt.Sprintf("%.5g", *l.New), string(l.NewScope)
		}
		remark := ""
		switch {
		case l.New == nil && l.Deciding != "":
			remark = fmt.Sprintf("%s does not apply: the %s's thresholds of another severity decide", p.Severity, l.Deciding)
		case l.Kept:
			remark = "set by hand, stays (--replace-manual)"
		case l.NewScope == schema.ScopeCluster:
			remark = fmt.Sprintf("pooled with classes %s; %d more scores for one of its own", strings.Trim(fmt.Sprint(l.Cluster), "[]"), l.Missing)
		case l.Class != nil && l.NewScope == schema.ScopeModel:
			remark = fmt.Sprintf("the model's; %d more scores for one of its own", l.Missing)
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%d\t%.3g\t%d\t%d\t%s\n", name, l.Scores, old, oldScope, value, scope, l.N, l.Achieved, l.AlertsOld, l.AlertsNew, remark)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, t := range p.set {
		if t.Scope == schema.ScopeLimit {
			fmt.Fprintf(out, "\nabsolute limit (critical) for every class: %.5g, at a rate of %g\n", t.Value, *t.Alpha)
		}
	}
	for i, a := range p.aside {
		if i == 0 {
			fmt.Fprintln(out)
		}
		fmt.Fprintln(out, a)
	}
	fmt.Fprintf(out, "\nAlerts on the %d scores of the last week: %d with the old thresholds, %d with the new.\n", p.WeekScores, p.AlertsOld, p.AlertsNew)
	if p.Applied != 0 {
		_, err := fmt.Fprintf(out, "Applied as change %d; take it back with: decuwatch thresholds rollback --reason ...\n", p.Applied)
		return err
	}
	_, err := fmt.Fprintln(out, "Nothing was changed. Apply with --apply --reason ...")
	return err
}

// by returns who is named, or else the user who runs the program.
func by(name string) string {
	if name != "" {
		return name
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return "unknown"
}

type thresholdsHistoryCmd struct {
	Model    string             `placeholder:"NAME" help:"Changes of this model only."`
	Limit    int                `default:"20" help:"The newest so many changes."`
	JSON     bool               `name:"json" help:"Print JSON, with every threshold."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (thresholdsHistoryCmd) Help() string {
	return `Example:

  decuwatch thresholds history --model fashion-mnist`
}

func (c *thresholdsHistoryCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Limit < 1 {
		return usage("--limit is %d, must be at least 1", c.Limit)
	}
	store, err := c.Postgres.Open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()
	changes, err := store.ThresholdHistory(ctx, c.Model, c.Limit)
	if err != nil {
		return err
	}
	if c.JSON {
		if changes == nil {
			changes = []postgres.ThresholdChange{}
		}
		return writeJSON(s.out, changes)
	}
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "change\tset at\tby\tkind\tthresholds\treason")
	for _, change := range changes {
		kind := change.Kind
		if change.Undoes != 0 {
			kind = fmt.Sprintf("%s of %d", kind, change.Undoes)
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%d\t%s\n", change.ID, change.SetAt.Local().Format(time.DateTime), printable(change.SetBy), kind, len(change.Thresholds), printable(change.Reason))
	}
	return w.Flush()
}

type thresholdsRollbackCmd struct {
	Reason   string             `required:"" help:"Why, for the history."`
	By       string             `placeholder:"NAME" help:"Who does it. Defaults to the user who runs this."`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (thresholdsRollbackCmd) Help() string {
	return `Takes the newest change that still stands back, of whichever model; a second rollback takes back the one before it. Running monitors follow at once.

Example:

  decuwatch thresholds rollback --reason "too many alerts"`
}

func (c *thresholdsRollbackCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if strings.TrimSpace(c.Reason) == "" {
		return usage("--reason is empty")
	}
	store, err := c.Postgres.Open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()
	change, err := store.RollbackThresholds(ctx, by(c.By), strings.TrimSpace(c.Reason))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.out, "change %d takes back change %d: %d thresholds\n", change.ID, change.Undoes, len(change.Thresholds))
	return err
}

// Package patrol looks over what is stored, at intervals, and raises the alerts that no single score can: a class whose
// scores rose above the model's distribution, thresholds that no longer apply, the summary of alerts that were held
// back. It holds rolling quantiles against the frozen thresholds as a metric.
package patrol

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"gonum.org/v1/gonum/stat"

	"github.com/decuwatch/decuwatch/alerts/drift"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/schema"
)

// History reads stored scores and alerts.
type History interface {
	// Now returns the time by the clock that the other methods' moments are of.
	Now(ctx context.Context) (time.Time, error)
	// HeldBack counts the alerts recorded in [from, to) that were not sent, by hour, class and severity.
	HeldBack(ctx context.Context, from, to time.Time) ([]schema.HeldBack, error)
	// ClassSequences returns the class gaps of each class's newest scores, at most limit, with event times after since,
	// and after quiet has passed since the class's last alert of kind class_drift.
	ClassSequences(ctx context.Context, of schema.Series, since time.Time, quiet time.Duration,
		limit int) ([]schema.ClassSequence, error)
	// ClassGapDistances returns the mean distance of the class gap of the newest scores of some classes, at most limit of
	// each with event times since a moment.
	ClassGapDistances(ctx context.Context, of schema.Series, classes []int, since time.Time,
		limit int) ([]schema.ClassDistance, error)
	// Tail returns the value that a share alpha of the scores of some classes since a moment reach, and their number.
	Tail(ctx context.Context, of schema.Series, measurement schema.MeasurementName, classes []int, since time.Time,
		alpha float64) (float64, int, error)
}

// Raiser commits an alert; false if an alert with its id exists already, so that several monitors may patrol.
type Raiser interface {
	RaiseAlert(ctx context.Context, a schema.Alert) (bool, error)
}

// ThresholdSource reads the thresholds in force.
type ThresholdSource interface {
	Thresholds(ctx context.Context) ([]schema.Threshold, error)
	// NewestChange returns the newest change of a threshold of a model's measurement, or 0 if it never had one.
	NewestChange(ctx context.Context, model string, of schema.MeasurementName) (int64, error)
}

// Model is what is patrolled.
type Model struct {
	Name           string
	EnsembleDigest string
	Settings       string          // of the fixed profile
	WellSampled    []int           // classes that the model should know
	Reference      drift.Reference // class gaps of those classes, frozen; if Empty, class drift is not watched
	// Expected is the mean distance of the class gap that the closed form in the manifest expects, by class. Classes that
	// are missing are not compared.
	Expected map[int]float64
}

// Series returns the series of the scores that the model's monitors store.
func (m *Model) Series() schema.Series {
	return schema.Series{Model: m.Name, EnsembleDigest: m.EnsembleDigest, Settings: m.Settings}
}

// Config is the configuration of a [Patrol]: how stored scores are looked over for what no single score shows. Fields
// with a name are settings.
type Config struct {
	// Interval at which held-back alerts and stale thresholds are checked.
	Every time.Duration `name:"every" default:"1m" min:"1s"`
	// Average number of requests of a class, at least, until a false alarm of its drift.
	RunLength float64 `name:"run-length" default:"10000"`
	// Newest scores of a class that are checked for a drift.
	Newest int `name:"newest" default:"200" min:"1"`
	// How long after a drift alert the scores of its class do not count.
	Quiet time.Duration `name:"quiet" default:"24h" min:"0s"`

	Log        *slog.Logger          `kong:"-"` // Defaults to slog.Default()
	Registerer prometheus.Registerer `kong:"-"`
}

// Check returns an error that names the settings out of their bounds.
func (c Config) Check() error {
	if !(c.RunLength > 1) || math.IsInf(c.RunLength, 0) {
		return settings.Errorf("patrol.run-length is %g, must be finite and above 1", c.RunLength)
	}
	return settings.Check("patrol", c)
}

const (
	driftEvery  = 5 * time.Minute    // between looks at class drift
	shadowEvery = time.Hour          // between looks at rolling quantiles and closed forms
	window      = 7 * 24 * time.Hour // of event time that is looked at
)

// Patrol looks over the stored scores of some models.
type Patrol struct {
	config     Config
	models     []Model
	history    History
	thresholds ThresholdSource
	raiser     Raiser
	metrics    *metrics
	apart      map[string]bool // classes whose class gap was found far from the closed form, by model and label
}

// New returns a patrol. The error names a setting that is out of its bounds.
func New(c Config, models []Model, h History, t ThresholdSource, r Raiser) (*Patrol, error) {
	c = settings.WithDefaults(c)
	c.Log = cmp.Or(c.Log, slog.Default())
	if err := c.Check(); err != nil {
		return nil, err
	}
	p := &Patrol{
		config: c, models: models, history: h, thresholds: t, raiser: r, metrics: newMetrics(c.Registerer, models),
		apart: map[string]bool{},
	}
	return p, nil
}

// Run patrols until ctx ends and returns nil. What fails is logged and tried again at the next turn.
func (p *Patrol) Run(ctx context.Context) error {
	var drifts, shadows time.Time // of the last look
	for {
		now := time.Now()
		looks := []func(context.Context, time.Time) error{p.Summaries, p.Stale}
		if now.Sub(drifts) >= driftEvery {
			drifts = now
			looks = append(looks, p.ClassDrift)
		}
		if now.Sub(shadows) >= shadowEvery {
			shadows = now
			looks = append(looks, p.Shadow, p.ClosedForm)
		}
		if err := p.look(ctx, looks); err != nil && ctx.Err() == nil {
			p.config.Log.Warn("patrol failed", "retry", p.config.Every, "err", err)
		}
		timer := time.NewTimer(p.config.Every)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

// look patrols at the present moment of the history's clock.
func (p *Patrol) look(ctx context.Context, looks []func(context.Context, time.Time) error) error {
	now, err := p.history.Now(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, look := range looks {
		errs = append(errs, look(ctx, now))
	}
	return errors.Join(errs...)
}

// Summaries raises, for each class and severity, one alert on the alerts of each hour that were held back. An hour is
// summed up when it has been over for a minute; hours of the last two days that a monitor missed are made up for.
func (p *Patrol) Summaries(ctx context.Context, now time.Time) error {
	const settle, back = time.Minute, 48 * time.Hour
	until := now.Add(-settle).UTC().Truncate(time.Hour)
	held, err := p.history.HeldBack(ctx, until.Add(-back), until)
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range held {
		n := h.ClassBudget + h.ModelBudget + h.CoolDown
		end := h.Hour.Add(time.Hour)
		first, err := p.raise(ctx, schema.Alert{
			ID: schema.ID(string(schema.AlertSummary), h.Model, fmt.Sprint(h.ClassIndex), string(h.Severity),
				h.Hour.Format(time.RFC3339)), Kind: schema.AlertSummary,
			Model: h.Model, ClassIndex: h.ClassIndex, ClassLabel: h.ClassLabel, Severity: h.Severity, EventTime: h.Hour,
			FiredAt: now.UTC().Truncate(time.Microsecond), Count: n,
			Detail: fmt.Sprintf("%d more alerts from %s to %s were not sent: %d beyond the class's budget, %d beyond the "+
				"model's, %d in the cool-down; all of them are in review",
				n, terminal.Time(h.Hour), terminal.Time(end), h.ClassBudget, h.ModelBudget, h.CoolDown),
		})
		if first {
			p.metrics.heldBack.WithLabelValues(h.Model, "class_budget").Add(float64(h.ClassBudget))
			p.metrics.heldBack.WithLabelValues(h.Model, "model_budget").Add(float64(h.ModelBudget))
			p.metrics.heldBack.WithLabelValues(h.Model, "cool_down").Add(float64(h.CoolDown))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Stale raises one alert for each model and measurement whose thresholds were all set for another ensemble or other
// settings, or were all withdrawn: nothing decides until thresholds are set anew.
func (p *Patrol) Stale(ctx context.Context, now time.Time) error {
	thresholds, err := p.thresholds.Thresholds(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range p.models {
		for _, measurement := range schema.MeasurementNames() {
			applies, others := 0, 0
			for _, t := range thresholds {
				if t.Model != m.Name || t.Measurement != measurement || t.Scope == schema.ScopeLimit {
					continue
				}
				if t.Series() == m.Series() {
					applies++
				} else {
					others++
				}
			}
			id := []string{string(schema.AlertThresholdMissing), m.Name, m.EnsembleDigest, m.Settings, string(measurement)}
			detail := fmt.Sprintf("the %d thresholds of %s belong to another ensemble or other settings and do not apply "+
				"to %.12s: calibrate anew", others, measurement, m.EnsembleDigest)
			missing := applies == 0 && others > 0
			if applies == 0 && others == 0 {
				change, err := p.thresholds.NewestChange(ctx, m.Name, measurement)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				missing = change > 0
				id = append(id, fmt.Sprint(change)) // each time that none is left
				detail = fmt.Sprintf("change %d left no threshold of %s: scores are stored, but raise no alert", change,
					measurement)
			}
			if !missing {
				p.metrics.stale.WithLabelValues(m.Name, string(measurement)).Set(0)
				continue
			}
			p.metrics.stale.WithLabelValues(m.Name, string(measurement)).Set(1)
			_, err := p.raise(ctx, schema.Alert{
				ID: schema.ID(id...), Kind: schema.AlertThresholdMissing, Model: m.Name, ClassIndex: -1,
				Severity: schema.SeverityCritical, Measurement: measurement, EventTime: now.UTC().Truncate(time.Microsecond),
				FiredAt: now.UTC().Truncate(time.Microsecond), Count: others,
				Receipt: schema.Receipt{EnsembleDigest: m.EnsembleDigest, Settings: m.Settings},
				Detail:  detail,
			})
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ClassDrift raises an alert for each class whose scores, in order of event time, rose above the model's reference, by
// [drift.Scan]. A class that is always uncertain does so whatever its own threshold.
func (p *Patrol) ClassDrift(ctx context.Context, now time.Time) error {
	var errs []error
	for _, m := range p.models {
		if m.Reference.Empty() {
			continue
		}
		sequences, err := p.history.ClassSequences(ctx, m.Series(), now.Add(-window), p.config.Quiet, p.config.Newest)
		errs = append(errs, err)
		for _, q := range sequences {
			pvalues := make([]float64, len(q.Values))
			for i, v := range q.Values {
				pvalues[i] = m.Reference.PValue(v)
			}
			rise, alarm := drift.Scan(pvalues, q.Weights, p.config.RunLength)
			if !alarm {
				continue
			}
			mean := stat.Mean(q.Values[:rise.At+1], q.Weights[:rise.At+1])
			at := q.Times[rise.At]
			_, err := p.raise(ctx, schema.Alert{
				ID: schema.ID(string(schema.AlertClassDrift), m.Name, m.EnsembleDigest, m.Settings, fmt.Sprint(q.ClassIndex),
					at.Truncate(p.config.Quiet).Format(time.RFC3339)), Kind: schema.AlertClassDrift,
				Model: m.Name, ClassIndex: q.ClassIndex, ClassLabel: q.ClassLabel, Severity: schema.SeverityWarn,
				Measurement: schema.ClassGap, Value: mean, Decided: math.Min(rise.Evidence, math.MaxFloat64),
				Threshold: p.config.RunLength, ClassGap: mean, Count: rise.At + 1,
				EventTime: at, FiredAt: now.UTC().Truncate(time.Microsecond),
				Receipt: schema.Receipt{EnsembleDigest: m.EnsembleDigest, Settings: m.Settings},
				Detail: fmt.Sprintf("%d requests of the class have a mean class gap of %.4g, above what the model's "+
					"well-sampled classes show; without a rise, a false alarm comes once in %g requests of a class at most",
					rise.At+1, mean, p.config.RunLength),
			})
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Shadow holds the rolling quantile of the model's well-sampled classes against the frozen threshold of the model, at
// that threshold's rate. It decides nothing.
func (p *Patrol) Shadow(ctx context.Context, now time.Time) error {
	thresholds, err := p.thresholds.Thresholds(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range p.models {
		for _, measurement := range schema.MeasurementNames() {
			ratio := 0.0
			for _, t := range thresholds {
				if t.Series() != m.Series() || t.Measurement != measurement ||
					t.Scope != schema.ScopeModel || t.Severity != schema.SeverityWarn || t.Alpha == nil || t.Value <= 0 {
					continue
				}
				value, n, err := p.history.Tail(ctx, m.Series(), measurement, m.WellSampled, now.Add(-window), *t.Alpha)
				if errs = append(errs, err); err == nil && float64(n)**t.Alpha >= 1 {
					ratio = value / t.Value
				}
			}
			p.metrics.shadow.WithLabelValues(m.Name, string(measurement)).Set(ratio)
		}
	}
	return errors.Join(errs...)
}

const (
	comparedScores = 50  // newest scores of a class that are held against the closed form, at most
	neededScores   = 5   // at least
	farApart       = 4.0 // factor beyond which a class is logged
)

// ClosedForm holds the mean distance of the class gap that was measured against the one that the manifest's closed form
// expects, class by class. It decides nothing. A class that is far apart is logged once. A few drawn tables scatter
// around the expectation, so only a large factor means something: the tables, the closed form or the sampler is wrong.
func (p *Patrol) ClosedForm(ctx context.Context, now time.Time) error {
	var errs []error
	for _, m := range p.models {
		if len(m.Expected) == 0 {
			continue
		}
		measured, err := p.history.ClassGapDistances(ctx, m.Series(), slices.Sorted(maps.Keys(m.Expected)),
			now.Add(-window), comparedScores)
		errs = append(errs, err)
		least, greatest := 0.0, 0.0
		for _, c := range measured {
			if c.N < neededScores {
				continue
			}
			ratio := c.Distance / m.Expected[c.ClassIndex]
			if least == 0 || ratio < least {
				least = ratio
			}
			greatest = max(greatest, ratio)
			key, far := m.Name+"\n"+c.ClassLabel, ratio > farApart || ratio < 1/farApart
			if far && !p.apart[key] {
				p.config.Log.Warn("the class gap is far from what the ensemble's closed form expects", "model", m.Name,
					"class", c.ClassLabel, "measured", c.Distance, "expected", m.Expected[c.ClassIndex], "scores", c.N)
			}
			p.apart[key] = far
		}
		if err == nil {
			p.metrics.closedForm.WithLabelValues(m.Name, endLeast).Set(least)
			p.metrics.closedForm.WithLabelValues(m.Name, endGreatest).Set(greatest)
		}
	}
	return errors.Join(errs...)
}

func (p *Patrol) raise(ctx context.Context, a schema.Alert) (bool, error) {
	a.Reason = schema.Reason(a.Kind)
	first, err := p.raiser.RaiseAlert(ctx, a)
	if err != nil || !first {
		return false, err
	}
	p.metrics.raised.WithLabelValues(a.Model, string(a.Kind)).Inc()
	p.config.Log.Info("alert", "alert", a.ID, "kind", a.Kind, "model", a.Model, "class", a.ClassLabel, "severity",
		a.Severity, "detail", a.Detail)
	return true, nil
}

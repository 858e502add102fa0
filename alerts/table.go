package alerts

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/decuwatch/decuwatch/schema"
)

// Table is an immutable set of thresholds.
type Table struct {
	size       int
	last       int64                       // the highest id
	thresholds map[key][]*schema.Threshold // of each scope, one for each severity, warn before critical
	known      map[known]map[schema.Series]bool
	newest     map[string]int64 // SetAt of the newest threshold, in Unix nanoseconds, by model
}

// key is what thresholds are found by.
type key struct {
	series      schema.Series
	measurement schema.MeasurementName
	scope       schema.Scope
	class       int // -1 for the scopes model and limit
}

// known says that a model has thresholds of a measurement, of whichever ensemble and settings.
type known struct {
	model       string
	measurement schema.MeasurementName
}

// ReadTable returns the table of the thresholds in force.
func ReadTable(ctx context.Context, source interface {
	Thresholds(ctx context.Context) ([]schema.Threshold, error)
}) (*Table, error) {
	thresholds, err := source.Thresholds(ctx)
	if err != nil {
		return nil, err
	}
	return NewTable(thresholds)
}

// NewTable returns the table of the given thresholds. If two have the same scope and severity, the one with the
// higher id stands; if it is withdrawn, neither stands. The error names an invalid threshold: an unknown scope,
// measurement or severity, a number that is not finite, a class that is missing or must not be there.
func NewTable(thresholds []schema.Threshold) (*Table, error) {
	t := &Table{thresholds: map[key][]*schema.Threshold{}, known: map[known]map[schema.Series]bool{},
		newest: map[string]int64{}}
	sorted := slices.Clone(thresholds)
	slices.SortStableFunc(sorted, func(a, b schema.Threshold) int { return int(min(max(a.ID-b.ID, -1), 1)) })
	for i := range sorted {
		th := &sorted[i]
		if err := check(th); err != nil {
			return nil, fmt.Errorf("threshold %d of model %s: %w", th.ID, th.Model, err)
		}
		k := key{th.Series(), th.Measurement, th.Scope, -1}
		if th.Class != nil {
			k.class = *th.Class
		}
		same := func(o *schema.Threshold) bool { return o.Severity == th.Severity }
		t.last = th.ID
		if at := slices.IndexFunc(t.thresholds[k], same); at >= 0 {
			t.thresholds[k] = slices.Delete(t.thresholds[k], at, at+1)
			t.size--
		}
		if th.Withdrawn {
			continue
		}
		t.thresholds[k] = append(t.thresholds[k], th)
		slices.SortFunc(t.thresholds[k], func(a, b *schema.Threshold) int { return rank(a.Severity) - rank(b.Severity) })
		t.size++
		if th.Scope != schema.ScopeLimit {
			k := known{th.Model, th.Measurement}
			if t.known[k] == nil {
				t.known[k] = map[schema.Series]bool{}
			}
			t.known[k][th.Series()] = true
		}
		t.newest[th.Model] = max(t.newest[th.Model], th.SetAt.UnixNano())
	}
	return t, nil
}

func check(th *schema.Threshold) error {
	finite := func(f float64) bool { return !math.IsNaN(f) && !math.IsInf(f, 0) }
	perClass := th.Scope == schema.ScopeClass || th.Scope == schema.ScopeCluster
	switch {
	case reasons[th.Scope] == "":
		return fmt.Errorf("scope %q is not class, cluster, model or limit", th.Scope)
	case !slices.Contains(schema.MeasurementNames(), th.Measurement):
		return fmt.Errorf("measurement %q is not one of %s", th.Measurement, schema.List(schema.MeasurementNames()))
	case th.Severity != schema.SeverityWarn && th.Severity != schema.SeverityCritical:
		return fmt.Errorf("severity %q is not %s or %s", th.Severity, schema.SeverityWarn, schema.SeverityCritical)
	case !finite(th.Value):
		return fmt.Errorf("value %g is not finite", th.Value)
	case th.Distance != nil && !finite(*th.Distance):
		return fmt.Errorf("distance %g is not finite", *th.Distance)
	case perClass != (th.Class != nil):
		return fmt.Errorf("scope %s and class do not fit: a class belongs to the scopes class and cluster", th.Scope)
	case perClass && *th.Class < 0:
		return fmt.Errorf("class %d is below 0", *th.Class)
	}
	return nil
}

// Len returns the number of thresholds.
func (t *Table) Len() int {
	if t == nil {
		return 0
	}
	return t.size
}

// Applicable are the thresholds that apply to one measurement of the scores of one class.
type Applicable struct {
	Thresholds []*schema.Threshold // of the most specific scope that has any, warn before critical
	Limits     []*schema.Threshold // absolute limits, which apply beside them, warn before critical
	Fallback   Fallback            // why the class's own thresholds do not decide; "" if they do
}

// Scope returns the scope whose thresholds decide, or "" if there is no threshold.
func (a Applicable) Scope() schema.Scope {
	if len(a.Thresholds) == 0 {
		return ""
	}
	return a.Thresholds[0].Scope
}

// Of returns the threshold of a severity, limits aside, or nil.
func (a Applicable) Of(severity schema.Severity) *schema.Threshold {
	for _, th := range a.Thresholds {
		if th.Severity == severity {
			return th
		}
	}
	return nil
}

// All returns the thresholds and the limits.
func (a Applicable) All() []*schema.Threshold { return slices.Concat(a.Thresholds, a.Limits) }

// SetAside returns the thresholds of wider scopes that do not apply to a class, because the class or its cluster has
// thresholds of its own: those of the cluster first, warn before critical.
func (t *Table) SetAside(series schema.Series, measurement schema.MeasurementName, class int) []*schema.Threshold {
	if t == nil {
		return nil
	}
	cluster := t.thresholds[key{series, measurement, schema.ScopeCluster, class}]
	model := t.thresholds[key{series, measurement, schema.ScopeModel, -1}]
	switch t.Applicable(series, measurement, class).Scope() {
	case schema.ScopeClass:
		return slices.Concat(cluster, model)
	case schema.ScopeCluster:
		return slices.Clone(model)
	default:
		return nil
	}
}

// Applicable returns the thresholds that apply to a measurement of the scores of a class in a series. It is the only
// place that knows the rule: the class's thresholds decide if it has any, of whichever severity; else those of its
// cluster; else those of the model. Absolute limits apply beside them. Class -1 asks for the model's thresholds. A nil
// table holds no thresholds.
func (t *Table) Applicable(series schema.Series, measurement schema.MeasurementName, class int) Applicable {
	if t == nil {
		return Applicable{Fallback: FallbackMissing}
	}
	a := Applicable{Limits: t.thresholds[key{series, measurement, schema.ScopeLimit, -1}]}
	for _, s := range []struct {
		scope    schema.Scope
		class    int
		fallback Fallback
	}{
		{schema.ScopeClass, class, ""}, {schema.ScopeCluster, class, FallbackCluster}, {schema.ScopeModel, -1, FallbackModel},
	} {
		if a.Thresholds = t.thresholds[key{series, measurement, s.scope, s.class}]; len(a.Thresholds) > 0 {
			a.Fallback = s.fallback
			return a
		}
	}
	a.Fallback = FallbackMissing
	for other := range t.known[known{series.Model, measurement}] {
		if other != series {
			a.Fallback = FallbackStale
		}
	}
	return a
}

package schema

import (
	"errors"
	"fmt"
	"strings"
)

// ErrContradiction is returned for a change after which a critical threshold would be below the warn threshold of its
// scope.
var ErrContradiction = errors.New("thresholds contradict each other")

// scopeKey is what the severities of one scope have in common.
type scopeKey struct {
	series      Series
	measurement MeasurementName
	scope       Scope
	class       int // -1 for a scope without a class
}

func (t *Threshold) scopeKey() scopeKey {
	k := scopeKey{t.Series(), t.Measurement, t.Scope, -1}
	if t.Class != nil {
		k.class = *t.Class
	}
	return k
}

// CheckChange returns an error that wraps [ErrContradiction] if, after the change, a critical threshold could fire on
// a score that the warn threshold of its scope lets pass. The error names each such scope. A later threshold replaces
// an earlier one of the same scope and severity. Scopes that the change does not touch are not checked.
func CheckChange(inForce, change []Threshold) error {
	after := map[scopeKey]map[Severity]*Threshold{}
	var touched []scopeKey
	for i := range change {
		if k := change[i].scopeKey(); after[k] == nil {
			after[k] = map[Severity]*Threshold{}
			touched = append(touched, k)
		}
	}
	set := func(t *Threshold) {
		if severities := after[t.scopeKey()]; severities != nil {
			severities[t.Severity] = t
		}
	}
	for i := range inForce {
		set(&inForce[i])
	}
	for i := range change {
		set(&change[i])
	}
	var found []string
	for _, k := range touched {
		warn, critical := after[k][SeverityWarn], after[k][SeverityCritical]
		if warn == nil || critical == nil || warn.Withdrawn || critical.Withdrawn {
			continue
		}
		if what := contradiction(warn, critical); what != "" {
			found = append(found, fmt.Sprintf("%s of %s, %s: %s", k.measurement, k.series.Model, k, what))
		}
	}
	if found == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrContradiction, strings.Join(found, "; "))
}

// String names the scope, and the class if there is one.
func (k scopeKey) String() string {
	if k.class < 0 {
		return "scope " + string(k.scope)
	}
	return fmt.Sprintf("scope %s, class %d", k.scope, k.class)
}

// contradiction says how critical can fire on a score that warn lets pass. It returns "" if that is impossible.
func contradiction(warn, critical *Threshold) string {
	switch {
	case critical.Value < warn.Value:
		return fmt.Sprintf("critical value %g is below warn value %g", critical.Value, warn.Value)
	case warn.Distance == nil:
		return ""
	case critical.Distance == nil:
		return fmt.Sprintf("critical has no distance and fires on every saturated score, but warn has distance %g",
			*warn.Distance)
	case *critical.Distance < *warn.Distance:
		return fmt.Sprintf("critical distance %g is below warn distance %g", *critical.Distance, *warn.Distance)
	}
	return ""
}

package schema

import (
	"errors"
	"strings"
	"testing"
)

func TestCheckChange(t *testing.T) {
	at := func(f float64) *float64 { return &f }
	class := func(i int) *int { return &i }
	th := func(scope Scope, class *int, severity Severity, value float64, distance *float64) Threshold {
		return Threshold{Model: "m", Measurement: ClassGap, Scope: scope, Class: class, Severity: severity, Value: value,
			Distance: distance}
	}
	withdrawn := func(t Threshold) Threshold { t.Withdrawn = true; return t }
	other := func(t Threshold, change func(*Threshold)) Threshold { change(&t); return t }
	warn := th("model", nil, SeverityWarn, 2, nil)
	low := th("model", nil, SeverityCritical, 1, nil)
	distant := th("model", nil, SeverityWarn, 2, at(40))
	for name, c := range map[string]struct {
		inForce, change []Threshold
		says            string // "" if the change is taken
	}{
		"critical below warn": {[]Threshold{warn}, []Threshold{low},
			"scope model: critical value 1 is below warn value 2"},
		"warn above critical": {[]Threshold{low}, []Threshold{warn}, "critical value 1 is below warn value 2"},
		"both in one change":  {nil, []Threshold{low, warn}, "critical value 1 is below warn value 2"},
		"equal":               {[]Threshold{warn}, []Threshold{th("model", nil, SeverityCritical, 2, nil)}, ""},
		"negative": {[]Threshold{th("model", nil, SeverityWarn, -1, nil)},
			[]Threshold{th("model", nil, SeverityCritical, -2, nil)}, "critical value -2"},
		"warn replaced by the change":  {[]Threshold{warn}, []Threshold{th("model", nil, SeverityWarn, 1, nil), low}, ""},
		"warn withdrawn by the change": {[]Threshold{warn}, []Threshold{withdrawn(warn), low}, ""},
		"withdrawing stays possible":   {[]Threshold{warn, low}, []Threshold{withdrawn(low)}, ""},
		"another scope":                {[]Threshold{warn}, []Threshold{th("limit", nil, SeverityCritical, 1, nil)}, ""},
		"limits": {[]Threshold{th("limit", nil, SeverityWarn, 3, nil)},
			[]Threshold{th("limit", nil, SeverityCritical, 1, nil)}, "scope limit: critical"},
		"a class": {
			[]Threshold{th("class", class(3), SeverityWarn, 3, nil)}, []Threshold{th("class", class(3), SeverityCritical, 1,
				nil)}, "scope class, class 3: critical",
		},
		"a cluster": {
			[]Threshold{th("cluster", class(0), SeverityWarn, 3, nil)},
			[]Threshold{th("cluster", class(0), SeverityCritical, 1, nil)}, "scope cluster, class 0: critical",
		},
		"another class": {[]Threshold{th("class", class(3), SeverityWarn, 3, nil)},
			[]Threshold{th("class", class(4), SeverityCritical, 1, nil)}, ""},
		"another measurement": {[]Threshold{warn}, []Threshold{other(low,
			func(t *Threshold) { t.Measurement = RequestRisk })}, ""},
		"another model": {[]Threshold{warn}, []Threshold{other(low, func(t *Threshold) { t.Model = "n" })},
			""},
		"another ensemble": {[]Threshold{warn}, []Threshold{other(low,
			func(t *Threshold) { t.EnsembleDigest = "n" })}, ""},
		"other settings": {[]Threshold{warn}, []Threshold{other(low,
			func(t *Threshold) { t.Settings = "n" })}, ""},
		"an old one elsewhere": {[]Threshold{warn, low}, []Threshold{th("class", class(1), SeverityWarn, 9, nil)},
			""},
		"distances": {[]Threshold{distant}, []Threshold{th("model", nil, SeverityCritical, 2, at(39))},
			"critical distance 39 is below warn distance 40"},
		"distances that agree": {[]Threshold{distant}, []Threshold{th("model", nil, SeverityCritical, 2, at(41))},
			""},
		"critical without a distance": {[]Threshold{distant}, []Threshold{th("model", nil, SeverityCritical, 3, nil)},
			"critical has no distance"},
		"a distance of critical's only": {[]Threshold{warn}, []Threshold{th("model", nil, SeverityCritical, 3, at(1))}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := CheckChange(c.inForce, c.change)
			if c.says == "" && err != nil {
				t.Fatal(err)
			}
			if c.says != "" && (!errors.Is(err, ErrContradiction) || !strings.Contains(err.Error(), c.says) ||
				!strings.Contains(err.Error(), "class_gap of m")) {
				t.Errorf("error is %v, want one that says %q", err, c.says)
			}
		})
	}
}

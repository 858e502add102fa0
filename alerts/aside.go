package alerts

import (
	"fmt"
	"slices"
	"strings"

	"github.com/decuwatch/decuwatch/schema"
)

// Aside is a threshold that does not apply to some classes, because they have more specific thresholds.
type Aside struct {
	Threshold *schema.Threshold
	Classes   []int // in ascending order
}

// Asides returns the thresholds of a series that do not apply to some of its classes.
func (t *Table) Asides(series schema.Series, measurement schema.MeasurementName, classes int) []*Aside {
	var list []*Aside
	for class := range classes {
		for _, th := range t.SetAside(series, measurement, class) {
			i := slices.IndexFunc(list, func(a *Aside) bool { return a.Threshold == th })
			if i < 0 {
				i = len(list)
				list = append(list, &Aside{Threshold: th})
			}
			list[i].Classes = append(list[i].Classes, class)
		}
	}
	return list
}

// Concerns reports whether the threshold t does not apply to some classes, or its class has lost another threshold.
func (a *Aside) Concerns(t schema.Threshold) bool {
	return a.Threshold.ID == t.ID || t.Class != nil && slices.Contains(a.Classes, *t.Class)
}

// Text says it in one sentence, with the labels of all classes.
func (a *Aside) Text(labels []string) string {
	names := make([]string, len(a.Classes))
	for i, class := range a.Classes {
		names[i] = fmt.Sprintf("%d %s", class, labels[class])
	}
	return fmt.Sprintf("the %s's %s threshold %g does not apply to classes with more specific thresholds: %s",
		a.Threshold.Scope, a.Threshold.Severity, a.Threshold.Value, strings.Join(names, ", "))
}

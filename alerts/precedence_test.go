package alerts_test

import (
	"testing"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/alerts/alertstest"
)

func TestPrecedence(t *testing.T) {
	for _, c := range alertstest.Cases() {
		t.Run(c.Name, func(t *testing.T) {
			d := alerts.Decide(c.Score(), table(t, c.Thresholds...))
			if f := d.Findings[0]; f.Severity != c.Severity || f.Reason != c.Reason {
				t.Errorf("finding is %+v, want severity %q and reason %s", f, c.Severity, c.Reason)
			}
		})
	}
}

package app

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// The clocks are compared within what the round trip leaves open.
func TestClocksAreCompared(t *testing.T) {
	for _, c := range []struct {
		name         string
		offset, trip time.Duration // of the worker ahead of the other
		want         string
	}{
		{"equal", 0, 0, ""},
		{"within", 29 * time.Second, 0, ""},
		{"ahead", 500 * 24 * time.Hour, 0,
			"this worker's clock is 12000h0m0s ahead of postgres's, at most 30s is allowed"},
		{"behind", -25 * time.Hour, 2 * time.Second,
			"this worker's clock is 24h59m59s behind postgres's, at most 30s is allowed"},
		{"unknown within a long trip", 40 * time.Second, 30 * time.Second, ""},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newReadiness(prometheus.NewRegistry(), 30*time.Second, nil)
			err := r.compare(t.Context(), "postgres", func(context.Context) (time.Time, error) {
				time.Sleep(c.trip / 2)
				now := time.Now().Add(-c.offset)
				time.Sleep(c.trip - c.trip/2)
				return now, nil
			})
			if text := fmt.Sprint(err); err == nil && c.want != "" || err != nil && text != c.want {
				t.Errorf("%s: %v", c.name, err)
			}
			if got := testutil.ToFloat64(r.offset.WithLabelValues("postgres")); got != c.offset.Seconds() {
				t.Errorf("%s: the metric is %g", c.name, got)
			}
		})
	}
}

// TestEveryPartHasARunbook compares the parts of readiness with the table that tells operators what to look at.
func TestEveryPartHasARunbook(t *testing.T) {
	text, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "### DecuwatchNotReady")
	section, _, _ = strings.Cut(section, "\n### ")
	listed := map[string]bool{}
	rows := regexp.MustCompile("(?m)^\\| `([a-z]+)` \\| .+ \\| .+ \\|$")
	for _, row := range rows.FindAllStringSubmatch(section, -1) {
		listed[row[1]] = true
	}
	for _, part := range parts {
		if !listed[part] {
			t.Errorf("docs/operating.md does not say what to look at if %s is not ready", part)
		}
		delete(listed, part)
	}
	for part := range listed {
		t.Errorf("docs/operating.md names the part %s, which does not exist", part)
	}
}

package compare_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/alerts"
	"github.com/decuwatch/decuwatch/monitor/compare"
	"github.com/decuwatch/decuwatch/schema"
)

var (
	before = schema.Series{Model: "m", EnsembleDigest: strings.Repeat("1", 64), Settings: "s"}
	after  = schema.Series{Model: "m", EnsembleDigest: strings.Repeat("2", 64), Settings: "s"}
)

// threshold is a model's threshold of the class gap.
func threshold(id int64, of schema.Series, value float64) schema.Threshold {
	return schema.Threshold{ID: id, Model: of.Model, EnsembleDigest: of.EnsembleDigest, Settings: of.Settings,
		Measurement: schema.ClassGap, Scope: schema.ScopeModel, Severity: schema.SeverityWarn, Value: value}
}

// compared compares class gaps of events, of two classes in turn.
func compared(t *testing.T, thresholds []schema.Threshold, pairs ...[2]float64) *compare.Result {
	t.Helper()
	table, err := alerts.NewTable(thresholds)
	if err != nil {
		t.Fatal(err)
	}
	c := compare.New(before, after, table)
	for i, pair := range pairs {
		score := func(of schema.Series, gap float64) *schema.Score {
			s := &schema.Score{
				Event: schema.Event{Source: "s", ID: fmt.Sprint("e", i), Time: time.Unix(int64(i), 0).UTC(),
					Data: schema.Generation{Model: of.Model}},
				ClassIndex: i % 2, ClassLabel: fmt.Sprint("class ", i%2),
				Receipt: schema.Receipt{EnsembleDigest: of.EnsembleDigest, Settings: of.Settings},
			}
			s.SetMeasurement(schema.ClassGap, schema.Measurement{Value: gap})
			return s
		}
		c.Add(score(before, pair[0]), score(after, pair[1]))
	}
	return c.Result()
}

func TestComparison(t *testing.T) {
	r := compared(t, []schema.Threshold{threshold(1, before, 3), threshold(2, after, 30)},
		[2]float64{1, 10}, [2]float64{2, 20}, [2]float64{3, 15}, [2]float64{2.5, 40}, [2]float64{4, 50})
	if r.Events != 5 || r.Total != (compare.Class{Class: -1, Label: "all", Events: 5, Before: 2, After: 2, Appear: 1,
		Disappear: 1}) {
		t.Errorf("%d events, %+v", r.Events, r.Total)
	}
	if len(r.Classes) != 2 || r.Classes[0].Disappear != 1 || r.Classes[1].Appear != 1 || r.Classes[1].Events != 2 {
		t.Errorf("classes %+v", r.Classes)
	}
	gap := r.Measurements[0]
	// Ranks 1 2 4 3 5 against 1 3 2 4 5: 1 - 6 * (1 + 4 + 1) / (5 * 24).
	if gap.Name != schema.ClassGap || gap.N != 5 || gap.Rank == nil || math.Abs(*gap.Rank-0.7) > 1e-12 ||
		!gap.ThresholdsBefore || !gap.ThresholdsAfter {
		t.Errorf("class gap %+v", gap)
	}
	// In class 0 1 3 4 against 10 15 50, in class 1 2 2.5 against 20 40: the same order.
	if gap.Within == nil || math.Abs(*gap.Within-1) > 1e-12 {
		t.Errorf("within classes %v", gap.Within)
	}
	if len(r.Requests) != 3 || r.Requests[0].ID != "e2" || r.Requests[0].RankBefore != 0.75 ||
		r.Requests[0].RankAfter != 0.25 || !r.Requests[0].AlertBefore || r.Requests[0].AlertAfter {
		t.Errorf("requests %+v", r.Requests)
	}
	var out bytes.Buffer
	if err := r.Print(&out); err != nil || !strings.Contains(out.String(), "rank correlation") {
		t.Errorf("%v:\n%s", err, &out)
	}
	kinds := map[string]int{}
	for _, line := range r.Lines() {
		text, err := json.Marshal(line)
		var is struct{ Kind string }
		if err != nil || json.Unmarshal(text, &is) != nil {
			t.Fatal(err)
		}
		kinds[is.Kind]++
	}
	if kinds["comparison"] != 1 || kinds["class"] != 3 || kinds["request"] != 3 {
		t.Errorf("lines %v", kinds)
	}
}

// What has a threshold now and none after is named, and twenty requests are enough.
func TestComparisonWithoutThresholds(t *testing.T) {
	var pairs [][2]float64
	for i := range 60 {
		pairs = append(pairs, [2]float64{float64(i), float64(i * 7 % 60)})
	}
	r := compared(t, []schema.Threshold{threshold(1, before, 3)}, pairs...)
	if lacking := r.Lacking(); len(lacking) != 1 || lacking[0] != schema.ClassGap {
		t.Errorf("lacking %v", lacking)
	}
	if len(r.Requests) != 20 {
		t.Errorf("%d requests", len(r.Requests))
	}
	var out bytes.Buffer
	if err := r.Print(&out); err != nil || !strings.Contains(out.String(), "No threshold decides on class_gap") {
		t.Errorf("%v:\n%s", err, &out)
	}
	constant := compared(t, nil, [2]float64{1, 1}, [2]float64{1, 2})
	if constant.Measurements[0].Rank != nil {
		t.Error("a constant has a rank correlation")
	}
}

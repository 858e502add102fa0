package drift

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/schema"
)

// stored are the samples of one window.
type stored struct {
	from, to time.Time
	samples  []schema.Sample
}

var errWindow = errors.New("another window was read")

func (s stored) Samples(
	_ context.Context, _ schema.Series, m schema.MeasurementName, from, to time.Time,
) ([]schema.Sample, error) {
	if m != schema.ClassGap || !from.Equal(s.from) || !to.Equal(s.to) {
		return nil, errWindow
	}
	return s.samples, nil
}

// The newest calibrated model threshold of the series says which window is the reference.
func TestCalibrated(t *testing.T) {
	series := schema.Series{Model: "m", EnsembleDigest: "d", Settings: "s"}
	day := func(n int) *time.Time { return new(time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC)) }
	threshold := func(id int64, from int, change func(*schema.Threshold)) schema.Threshold {
		th := schema.Threshold{
			ID: id, Model: "m", EnsembleDigest: "d", Settings: "s", Measurement: schema.ClassGap, Scope: schema.ScopeModel,
			Origin: "calibrated", WindowFrom: day(from), WindowTo: day(from + 1),
		}
		change(&th)
		return th
	}
	source := stored{*day(2), *day(3), []schema.Sample{{Class: 0, Value: 1}, {Class: 1, Value: 2}, {Class: 2, Value: 3}}}
	list := []schema.Threshold{
		threshold(1, 1, func(*schema.Threshold) {}), threshold(2, 2, func(*schema.Threshold) {}),
		threshold(3, 5, func(th *schema.Threshold) { th.Settings = "other" }),
		threshold(4, 5, func(th *schema.Threshold) { th.Measurement = schema.RequestRisk }),
		threshold(5, 5, func(th *schema.Threshold) { th.Scope = schema.ScopeClass }),
		threshold(6, 5, func(th *schema.Threshold) { th.Origin, th.WindowFrom, th.WindowTo = "manual", nil, nil }),
	}
	r, err := Calibrated(t.Context(), series, []int{0, 2}, list, source)
	if err != nil || r.PValue(4) != 1.0/3 || r.PValue(2) != 2.0/3 {
		t.Errorf("reference is %+v, %v", r, err)
	}
	if r, err := Calibrated(t.Context(), series, []int{0, 2}, list[2:], source); err != nil || !r.Empty() {
		t.Errorf("without a calibrated threshold the reference is %+v, %v", r, err)
	}
}

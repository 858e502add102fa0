// Package replay reruns stored scores from their receipts and compares the results.
package replay

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/decuwatch/decuwatch/internal/terminal"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// Latents reads the latents that events name.
type Latents = monitor.Latents

// Prepare returns the request that reruns a stored score, behind live work. A score that was made from the event's own
// latent needs it again: the error says if it is gone, or if latents is nil.
func Prepare(ctx context.Context, latents Latents, s *schema.Score) (scoring.Request, error) {
	request, err := Request(s)
	if err != nil || request.Latent == nil {
		return request, err
	}
	ref := s.Event.Data.Latent
	if latents == nil || ref == nil {
		return request, fmt.Errorf("%w: the score was made from the event's own latent %s, which is not at hand",
			scoring.ErrNoise, request.Latent.SHA256)
	}
	values, err := monitor.ReadLatent(ctx, latents, *ref, time.Time{})
	if err != nil {
		return request, fmt.Errorf("the score was made from the event's own latent: %w", err)
	}
	request.Latent.Values = values
	return request, nil
}

// Request returns the request that reruns a stored score, behind live work. It reads nothing but the score, so it lacks
// the numbers of the event's own latent. It measures a request risk that a cascade spared; if the receipt's settings do
// not say how, the error is a scoring.ErrSettings.
func Request(s *schema.Score) (scoring.Request, error) {
	r := s.Receipt
	measure := func(m *schema.Measurement) scoring.Measure {
		if m == nil {
			return scoring.Measure{}
		}
		return scoring.Measure{ // older scores name neither tables nor guidance, nor the steps of each measurement
			Tables: cmp.Or(m.Tables, ensemble.TablesMembers), Guidance: cmp.Or(m.Guidance, ensemble.GuidanceOwn),
			Steps: cmp.Or(m.Steps, r.Steps), BranchStep: m.BranchStep, RolloutSteps: m.RolloutSteps,
			Estimator: m.Estimator,
		}
	}
	profile := scoring.Profile{GuidanceScale: r.GuidanceScale, Eta: r.Eta, ClassGap: measure(&s.ClassGap),
		RequestRisk: measure(s.RequestRisk), ImageRisk: measure(s.ImageRisk)}
	if s.RequestRisk == nil {
		whole, err := ensemble.ParseSettings(r.Settings)
		if err != nil {
			return scoring.Request{}, fmt.Errorf("%w: %w", scoring.ErrSettings, err)
		}
		profile.RequestRisk = whole.RequestRisk
	}
	var own *scoring.Latent
	if r.LatentSHA256 != "" {
		own = &scoring.Latent{SHA256: r.LatentSHA256, Step: r.LatentStep}
		profile.Start = r.LatentStep
	}
	return scoring.Request{
		Latent: own,
		Key:    monitor.Key(s.Event.Source, s.Event.ID), Class: s.ClassIndex, Seed: r.Seed, Noise: r.Noise,
		Draw: scoring.Draw{
			Dtype: r.NoiseDtype, Offset: r.NoiseOffset, GPU: scoring.GPU{SMs: r.SMs, ThreadsPerSM: r.ThreadsPerSM},
			Batch: scoring.Batch{Index: r.BatchIndex, Size: r.BatchSize},
		},
		Profile: profile, Priority: scoring.Background,
	}, nil
}

// Replay is a stored score beside its recomputation.
type Replay struct {
	Source     string       `json:"source"`
	ID         string       `json:"id"`
	Agrees     bool         `json:"agrees"`
	Tolerance  float64      `json:"tolerance"`       // relative
	Floor      float64      `json:"tolerance_floor"` // absolute
	Difference float64      `json:"difference"`      // the largest relative difference
	Stored     schema.Score `json:"stored"`
	Recomputed schema.Score `json:"recomputed"`
}

// Run reruns a stored score on the engine that has its ensemble's digest. Engines are given by model.
func Run(
	ctx context.Context, engines map[string]*scoring.Engine, latents Latents, stored *schema.Score,
) (*Replay, error) {
	given := make([]string, 0, len(engines))
	for name, engine := range engines {
		if engine.Ensemble().Digest == stored.Receipt.EnsembleDigest {
			request, err := Prepare(ctx, latents, stored)
			if err != nil {
				return nil, err
			}
			result, err := engine.Score(ctx, request)
			if err != nil {
				return nil, err
			}
			return Compare(stored, result), nil
		}
		given = append(given, fmt.Sprintf("%s %s", name, engine.Ensemble().Digest))
	}
	slices.Sort(given)
	return nil, fmt.Errorf("the score was made by the ensemble %s %s; given is %q",
		stored.Event.Data.Model, stored.Receipt.EnsembleDigest, given)
}

// Compare compares a stored score with the result of its rerun.
func Compare(stored *schema.Score, result scoring.Result) *Replay {
	again := monitor.Compose(stored.Event, stored.ClassIndex, stored.ClassLabel, result, stored.Receipt.Deviations,
		stored.ScoredAt)
	r := &Replay{
		Source: stored.Event.Source, ID: stored.Event.ID, Agrees: again.Receipt.Carrier == stored.Receipt.Carrier,
		Tolerance: scoring.Tolerance, Floor: scoring.ToleranceFloor, Stored: *stored, Recomputed: again,
	}
	for _, m := range r.Measurements() {
		r.Agrees = r.Agrees && m.Agrees
		r.Difference = max(r.Difference, m.Difference)
	}
	return r
}

// Comparison is one measurement of a score beside its recomputation.
type Comparison struct {
	Name               schema.MeasurementName
	Stored, Recomputed schema.Measurement
	Agrees             bool    // every number agrees by scoring.Agrees
	Difference         float64 // the largest relative difference
}

// Measurements compares the measurements that were stored one by one, in the order of schema.Score.Measurements.
func (r *Replay) Measurements() []Comparison {
	again := map[schema.MeasurementName]schema.Measurement{}
	for _, m := range r.Recomputed.Measurements() {
		again[m.Name] = m.Measurement
	}
	var list []Comparison
	for _, m := range r.Stored.Measurements() {
		c := Comparison{Name: m.Name, Stored: m.Measurement, Difference: math.MaxFloat64} // JSON has no infinity
		if other, measured := again[m.Name]; measured {
			c.Recomputed = other
			c.Agrees, c.Difference = compare(c.Stored, c.Recomputed)
		}
		list = append(list, c)
	}
	return list
}

// compare compares the values, the mean distances and all single distances of two measurements.
func compare(a, b schema.Measurement) (agrees bool, difference float64) {
	x, y := numbers(a), numbers(b)
	if !slices.EqualFunc(a.Distances, b.Distances, func(a, b []float64) bool { return len(a) == len(b) }) {
		return false, math.MaxFloat64 // JSON has no infinity
	}
	agrees = true
	for i := range x {
		agrees = agrees && scoring.Agrees(x[i], y[i])
		if x[i] != y[i] {
			difference = max(difference, math.Abs(x[i]-y[i])/max(math.Abs(x[i]), math.Abs(y[i])))
		}
	}
	return agrees, difference
}

func numbers(m schema.Measurement) []float64 {
	return append([]float64{m.Value, m.MeanDistance}, slices.Concat(m.Distances...)...)
}

// Print writes the comparison as text.
func (r *Replay) Print(out io.Writer) error {
	receipt := r.Stored.Receipt
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "event\t%s of %s\n", terminal.Printable(r.ID), terminal.Printable(r.Source))
	fmt.Fprintf(w, "ensemble\t%s %s\n", r.Stored.Event.Data.Model, receipt.EnsembleDigest)
	fmt.Fprintf(w, "settings\t%s, class %q, seed %d, carrier %d\n", receipt.Settings, r.Stored.ClassLabel, receipt.Seed,
		receipt.Carrier)
	fmt.Fprintf(w, "\t\nmeasurement\tstored\trecomputed\trelative difference\n")
	for _, m := range r.Measurements() {
		fmt.Fprintf(w, "%s\t%.9g\t%.9g\t%.2g\n", m.Name, m.Stored.Value, m.Recomputed.Value, m.Difference)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	verdict := "agrees"
	if !r.Agrees {
		verdict = "does NOT agree"
	}
	_, err := fmt.Fprintf(out, "\nThe score %s within %g relative or %g absolute.\n", verdict, r.Tolerance, r.Floor)
	return err
}

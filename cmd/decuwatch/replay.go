package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"text/tabwriter"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

type replayCmd struct {
	ID        string         `arg:"" help:"Id of the event."`
	Source    string         `placeholder:"SOURCE" help:"Source of the event; required where several sources used the id."`
	Tolerance float64        `default:"1e-3" help:"Largest relative difference of a value or a distance that still agrees. Rows that share a run differ by some 1e-6, other machines and runtimes by more; docs/method.md has figures."`
	JSON      bool           `name:"json" help:"Print the comparison as JSON."`
	Scoring   ScoringConfig  `embed:"" prefix:"scoring." group:"Scoring"`
	Postgres  PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (replayCmd) Help() string {
	return `Reads a stored score, reruns its request from the receipt alone (seed, noise, class, steps, guidance, eta, branch steps, estimators, carrying component) through the ensemble of the same digest, and compares. Exit code 0 where the two agree, 3 where they do not.

Example:

  decuwatch replay -e ensembles/fashion-mnist 0198c0de-7b1a-7000-8000-5f0d3c1b2a49`
}

// replayed is the comparison of a stored score with its recomputation.
type replayed struct {
	Source     string       `json:"source"`
	ID         string       `json:"id"`
	Agrees     bool         `json:"agrees"`
	Tolerance  float64      `json:"tolerance"`
	Difference float64      `json:"difference"` // the largest relative one
	Stored     schema.Score `json:"stored"`
	Recomputed schema.Score `json:"recomputed"`
}

func (c *replayCmd) Run(ctx context.Context, s *streams, log *slog.Logger) (err error) {
	if err := errors.Join(c.Scoring.validate(), c.Postgres.validate()); err != nil {
		return err
	}
	if !(c.Tolerance >= 0) {
		return usage("--tolerance is %g, must be 0 or more", c.Tolerance)
	}
	store, err := postgres.Open(ctx, c.Postgres.config(log))
	if err != nil {
		return err
	}
	defer store.Close()
	stored, err := store.ScoreByID(ctx, c.Source, c.ID)
	if errors.Is(err, postgres.ErrNotFound) {
		return fmt.Errorf("no score is stored of the event %s", c.ID)
	}
	if err != nil {
		return err
	}
	life := newLifecycle(ctx, log)
	defer func() { err = joinEnd(err, life) }()
	engines, err := openEngines(c.Scoring, prometheus.NewRegistry(), slog.New(slog.DiscardHandler), life)
	if err != nil {
		return err
	}
	result, err := replay(ctx, engines, stored)
	if err != nil {
		return err
	}
	r := replayed{
		Source: stored.Event.Source, ID: stored.Event.ID, Tolerance: c.Tolerance, Stored: *stored,
		Recomputed: monitor.Compose(stored.Event, stored.ClassIndex, stored.ClassLabel, result, stored.Receipt.Deviations, stored.ScoredAt),
	}
	r.Difference = max(difference(r.Stored.ClassGap, r.Recomputed.ClassGap), difference(r.Stored.RequestRisk, r.Recomputed.RequestRisk))
	r.Agrees = r.Difference <= c.Tolerance && r.Recomputed.Receipt.Carrier == stored.Receipt.Carrier
	if c.JSON {
		err = writeJSON(s.out, r)
	} else {
		err = r.print(s)
	}
	if err == nil && !r.Agrees {
		err = errDifference
	}
	return err
}

// replay reruns a stored score from its receipt.
func replay(ctx context.Context, engines map[string]*scoring.Engine, stored *schema.Score) (scoring.Result, error) {
	receipt := stored.Receipt
	for _, engine := range engines {
		if engine.Ensemble().Digest != receipt.EnsembleDigest {
			continue
		}
		measure := func(m schema.Measurement) scoring.Measure {
			return scoring.Measure{BranchStep: m.BranchStep, RolloutSteps: m.RolloutSteps, Estimator: m.Estimator}
		}
		return engine.Score(ctx, scoring.Request{
			Key: monitor.Key(stored.Event.Source, stored.Event.ID), Class: stored.ClassIndex, Seed: receipt.Seed, Noise: receipt.Noise,
			Profile: scoring.Profile{
				Steps: receipt.Steps, GuidanceScale: receipt.GuidanceScale, Eta: receipt.Eta,
				ClassGap: measure(stored.ClassGap), RequestRisk: measure(stored.RequestRisk),
			},
			Priority: scoring.Background,
		})
	}
	given := make([]string, 0, len(engines))
	for name, engine := range engines {
		given = append(given, fmt.Sprintf("%s %s", name, engine.Ensemble().Digest))
	}
	slices.Sort(given)
	return scoring.Result{}, fmt.Errorf("the score was made by the ensemble %s %s; given is %q", stored.Event.Data.Model, receipt.EnsembleDigest, given)
}

// difference returns the largest relative difference of two measurements: of values and mean distances each to itself, of
// single distances to the largest one.
func difference(a, b schema.Measurement) float64 {
	relative := func(x, y, scale float64) float64 {
		if x == y {
			return 0
		}
		return math.Abs(x-y) / max(scale, math.SmallestNonzeroFloat64)
	}
	d := max(relative(a.Value, b.Value, math.Abs(a.Value)), relative(a.MeanDistance, b.MeanDistance, math.Abs(a.MeanDistance)))
	if len(a.Distances) != len(b.Distances) || a.Saturated != b.Saturated {
		return math.Inf(1)
	}
	largest := 0.0
	for _, row := range a.Distances {
		largest = max(largest, slices.Max(row))
	}
	for i := range a.Distances {
		for j := range a.Distances[i] {
			d = max(d, relative(a.Distances[i][j], b.Distances[i][j], largest))
		}
	}
	return d
}

func (r replayed) print(s *streams) error {
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "event\t%s of %s\n", printable(r.ID), printable(r.Source))
	fmt.Fprintf(w, "ensemble\t%s %s\n", r.Stored.Event.Data.Model, r.Stored.Receipt.EnsembleDigest)
	fmt.Fprintf(w, "settings\t%s, class %q, seed %d, carrier %d\n", r.Stored.Receipt.Settings, r.Stored.ClassLabel, r.Stored.Receipt.Seed, r.Stored.Receipt.Carrier)
	fmt.Fprintf(w, "\t\nmeasurement\tstored\trecomputed\trelative difference\n")
	for _, m := range []struct {
		name string
		a, b schema.Measurement
	}{{schema.ClassGap, r.Stored.ClassGap, r.Recomputed.ClassGap}, {schema.RequestRisk, r.Stored.RequestRisk, r.Recomputed.RequestRisk}} {
		fmt.Fprintf(w, "%s\t%.9g\t%.9g\t%.2g\n", m.name, m.a.Value, m.b.Value, difference(m.a, m.b))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	verdict := "agrees"
	if !r.Agrees {
		verdict = "does NOT agree"
	}
	_, err := fmt.Fprintf(s.out, "\nThe score %s within the tolerance %g.\n", verdict, r.Tolerance)
	return err
}

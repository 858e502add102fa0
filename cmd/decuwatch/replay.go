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

	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
	"github.com/decuwatch/decuwatch/scoring"
)

type replayCmd struct {
	ID       string             `arg:"" help:"Id of the event."`
	Source   string             `placeholder:"SOURCE" help:"Source of the event; required where several sources used the id."`
	Model    string             `placeholder:"NAME" help:"Model of the event; required if several models have an event of the id."`
	JSON     bool               `name:"json" help:"Print the comparison as JSON."`
	Scoring  app.ScoringConfig  `embed:"" prefix:"scoring." group:"Scoring"`
	Postgres app.PostgresConfig `embed:"" prefix:"postgres." group:"Postgres"`
}

func (replayCmd) Help() string {
	return `Reads a stored score, reruns its request from the receipt alone (seed, noise, class, steps, guidance, eta, branch steps, estimators, carrying component) through the ensemble of the same digest, and compares within the tolerance of docs/method.md. Exit code 0 where the two agree, 3 where they do not.

Example:

  decuwatch replay -e ensembles/fashion-mnist 0198c0de-7b1a-7000-8000-5f0d3c1b2a49`
}

// replayed is the comparison of a stored score with its recomputation.
type replayed struct {
	Source     string       `json:"source"`
	ID         string       `json:"id"`
	Agrees     bool         `json:"agrees"`
	Tolerance  float64      `json:"tolerance"`       // relative
	Floor      float64      `json:"tolerance_floor"` // absolute
	Difference float64      `json:"difference"`      // the largest relative one
	Stored     schema.Score `json:"stored"`
	Recomputed schema.Score `json:"recomputed"`
}

func (c *replayCmd) Run(ctx context.Context, s *streams, log *slog.Logger) (err error) {
	store, err := postgres.Open(ctx, c.Postgres.Config(log))
	if err != nil {
		return err
	}
	defer store.Close()
	stored, err := store.ScoreByID(ctx, schema.Identity{Source: c.Source, ID: c.ID, Model: c.Model})
	if errors.Is(err, postgres.ErrNotFound) {
		return fmt.Errorf("no score is stored: %w", err)
	}
	if err != nil {
		return err
	}
	life, ctx := app.NewLifecycle(ctx, log)
	defer life.End(&err)
	engines, err := app.OpenEngines(c.Scoring, prometheus.NewRegistry(), slog.New(slog.DiscardHandler), life)
	if err != nil {
		return err
	}
	result, err := replay(ctx, engines, stored)
	if err != nil {
		return err
	}
	r := replayed{
		Source: stored.Event.Source, ID: stored.Event.ID, Tolerance: scoring.Tolerance, Floor: scoring.ToleranceFloor, Stored: *stored,
		Recomputed: monitor.Compose(stored.Event, stored.ClassIndex, stored.ClassLabel, result, stored.Receipt.Deviations, stored.ScoredAt),
	}
	r.Agrees = r.Recomputed.Receipt.Carrier == stored.Receipt.Carrier
	recomputed := r.Recomputed.Measurements()
	for i, m := range r.Stored.Measurements() {
		c := compare(m.Measurement, recomputed[i].Measurement)
		r.Difference = max(r.Difference, c.difference)
		r.Agrees = r.Agrees && c.agrees
	}
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

// comparison is what compare found.
type comparison struct {
	agrees     bool    // every number agrees, as scoring.Agrees has it
	difference float64 // the largest relative one
}

// compare holds value, mean distance and every single distance of two measurements against each other.
func compare(a, b schema.Measurement) comparison {
	other := comparison{difference: math.MaxFloat64} // of another shape; JSON has no infinity
	if len(a.Distances) != len(b.Distances) {
		return other
	}
	c := comparison{agrees: true}
	number := func(x, y float64) {
		c.agrees = c.agrees && scoring.Agrees(x, y)
		if x != y {
			c.difference = max(c.difference, math.Abs(x-y)/max(math.Abs(x), math.Abs(y)))
		}
	}
	number(a.Value, b.Value)
	number(a.MeanDistance, b.MeanDistance)
	for i := range a.Distances {
		if len(a.Distances[i]) != len(b.Distances[i]) {
			return other
		}
		for j := range a.Distances[i] {
			number(a.Distances[i][j], b.Distances[i][j])
		}
	}
	return c
}

func (r replayed) print(s *streams) error {
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "event\t%s of %s\n", printable(r.ID), printable(r.Source))
	fmt.Fprintf(w, "ensemble\t%s %s\n", r.Stored.Event.Data.Model, r.Stored.Receipt.EnsembleDigest)
	fmt.Fprintf(w, "settings\t%s, class %q, seed %d, carrier %d\n", r.Stored.Receipt.Settings, r.Stored.ClassLabel, r.Stored.Receipt.Seed, r.Stored.Receipt.Carrier)
	fmt.Fprintf(w, "\t\nmeasurement\tstored\trecomputed\trelative difference\n")
	recomputed := r.Recomputed.Measurements()
	for i, m := range r.Stored.Measurements() {
		again := recomputed[i].Measurement
		fmt.Fprintf(w, "%s\t%.9g\t%.9g\t%.2g\n", m.Name, m.Value, again.Value, compare(m.Measurement, again).difference)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	verdict := "agrees"
	if !r.Agrees {
		verdict = "does NOT agree"
	}
	_, err := fmt.Fprintf(s.out, "\nThe score %s within %g relative or %g absolute.\n", verdict, r.Tolerance, r.Floor)
	return err
}

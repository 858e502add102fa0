package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"

	"github.com/decuwatch/decuwatch/scoring/evaluation"
)

type evalCmd struct {
	Path       string        `arg:"" help:"One manifest, or a directory: all its manifests of one backbone."`
	Profile    []string      `sep:"none" placeholder:"SETTINGS" help:"Profile to evaluate; may be repeated."`
	Seeds      int           `default:"8" help:"Requests of each class in each rotation. Defaults to 8."`
	ErrorSteps int           `default:"20" help:"Steps of the images whose errors are measured. Defaults to 20."`
	JSON       bool          `name:"json" help:"Print the results as JSON."`
	Out        string        `placeholder:"DIR" help:"Directory for results.json. Defaults to none."`
	Scoring    runtimeConfig `embed:"" prefix:"scoring." group:"Scoring"`
}

func (evalCmd) Help() string {
	return `Runs requests of every class through an ensemble and says how well its scores find under-sampled classes ` +
		`(class level), how well they rank the requests of one class by their error (request level), and what they cost ` +
		`in rows of U-Net work. Manifests of a directory that share the backbone are rotations: the same classes with ` +
		`other numbers of training images. Intervals are 95%, over resampled cells (a class in a rotation). Errors are ` +
		`measured at the manifest's guidance.

Examples:

  decuwatch eval ensembles/fashion-mnist
  decuwatch eval ensembles/fashion-mnist --seeds 4 --profile steps=10,guidance=1,request_risk=5+1:mean-w2
  decuwatch eval ensembles/fashion-mnist --json | jq '.scores[] | {settings, rows, within: .request_level.within}'

Keys of --profile: steps, guidance, eta, class_gap, request_risk; a measurement is ` +
		`BRANCH_STEP+ROLLOUT_STEPS:ESTIMATOR. What a profile does not name comes from the manifest; if steps changes, a ` +
		`measurement keeps its relative place. Without --profile, the manifest's profile is evaluated.`
}

func (c *evalCmd) Run(ctx context.Context, s *streams) error {
	e, err := evaluation.New(evaluation.Config{
		Ensemble: c.Path, Profiles: c.Profile, Seeds: c.Seeds, ErrorSteps: c.ErrorSteps, Options: c.Scoring.options(),
	})
	if err != nil {
		return err
	}
	bar := progress(s, e.Requests(), "evaluating")
	results, err := e.Run(ctx, func() { _ = bar.Add(1) }) // it only draws
	if err != nil {
		return err
	}
	_ = bar.Exit()
	var content bytes.Buffer
	if err := writeJSON(&content, results); err != nil {
		return err
	}
	if c.Out != "" {
		if err := os.MkdirAll(c.Out, 0o755); err != nil { //nolint:gosec // results are no secret
			return err
		}
		//nolint:gosec // likewise
		if err := os.WriteFile(filepath.Join(c.Out, "results.json"), content.Bytes(), 0o644); err != nil {
			return err
		}
	}
	if !c.JSON {
		return results.Print(s.out)
	}
	_, err = content.WriteTo(s.out)
	return err
}

package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"

	"github.com/decuwatch/decuwatch/scoring/evaluation"
)

type evalCmd struct {
	Path       []string      `arg:"" help:"Ensembles: a manifest, or a directory with its manifests of one backbone."`
	Profile    []string      `sep:"none" placeholder:"SETTINGS" help:"Profile to evaluate; may be repeated."`
	Truth      []string      `sep:"none" placeholder:"DIR" help:"Judge that says which images are wrong; repeatable."`
	Seeds      int           `default:"16" help:"Requests of each class in each rotation. Defaults to 16."`
	ErrorSteps int           `default:"20" help:"Steps of the images whose errors are measured. Defaults to 20."`
	AlarmSeeds int           `default:"60" help:"Further requests of each class, for false alarms. Defaults to 60."`
	Alpha      float64       `default:"0.05" placeholder:"RATE" help:"Wanted rate of false alarms. Defaults to 0.05."`
	JSON       bool          `name:"json" help:"Print the results as JSON."`
	Out        string        `placeholder:"DIR" help:"Directory for results.json. Defaults to none."`
	Scoring    runtimeConfig `embed:"" prefix:"scoring." group:"Scoring"`
}

func (evalCmd) Help() string {
	return `Runs requests of every class through an ensemble and says how good its scores are, and what they cost in ` +
		`rows of U-Net work. Manifests of a directory that share the backbone are rotations: the same classes with other ` +
		`numbers of training images. Intervals are 95%, over resampled cells (a class in a rotation). Several ensembles, ` +
		`for example of several training seeds, are also shown side by side.

Request level: does a score rank the requests of a class by their error? The error is that of a producer, a table ` +
		`that is not a member of the ensemble. The ceiling is what the error of a second producer reaches. Without ` +
		`producers there is only the old figure, against the error of the members themselves, which flatters the score.
Class level: does a score find under-sampled classes?
Image level: does a score find images of the producer that are not of the class asked for? --truth names a directory ` +
		`with judge.json and judge.onnx, as "decuwatch-train judge" writes it, of a judge that is not the ensemble's own.
False alarms: thresholds are calibrated on the first half of --alarm-seeds requests of each class, and alerts ` +
		`counted on the second, by the code that does it in production.
Controls: random scores, the number of images of the class, n_eff, the closed form of the class gap, mean distances.

Examples:

  decuwatch eval ensembles/fashion-mnist
  decuwatch eval ensembles/fashion-mnist --truth /tmp/judge --out results
  decuwatch eval seed-1 seed-2 --json | jq '.side_by_side[] | {name, mean, spread}'
  decuwatch eval ensembles/fashion-mnist --profile guidance=1,request_risk=0+3/4:mean-w2:members:shared

Keys of --profile: steps, guidance, eta, class_gap, request_risk, image_risk. A measurement is ` +
		`BRANCH_STEP+ROLLOUT_STEPS/STEPS:ESTIMATOR:TABLES:GUIDANCE, for example 0+2/3:mean-w2:members:shared, and ` +
		`image_risk may be "none". /STEPS, :TABLES and :GUIDANCE may be left out. What a profile does not name comes ` +
		`from the manifest. With steps, every measurement takes that many and keeps its relative place. Without ` +
		`--profile, the manifest's profile is evaluated.

Fields of the JSON: seeds; ensembles, each with its manifests, bins, profiles, scores, controls, ceiling, error, ` +
		`truths and false_alarms; side_by_side. A score and a control have class_level, request_level (within, ` +
		`within_by_bin, overall), request_level_of_own_members (the old figure) and image_level (one for each truth). ` +
		`A score also has rows, of_ceiling, by_members (with fewer members) and mean_distance. What is unknown is null.`
}

func (c *evalCmd) Run(ctx context.Context, s *streams) error {
	e, err := evaluation.New(evaluation.Config{
		Ensembles: c.Path, Profiles: c.Profile, Truths: c.Truth, Seeds: c.Seeds, ErrorSteps: c.ErrorSteps,
		AlarmSeeds: c.AlarmSeeds, Alpha: c.Alpha, Options: c.Scoring.options(),
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
	if err := writeIndented(&content, results); err != nil {
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
	return writeJSON(s.out, results)
}

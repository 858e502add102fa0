package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/sync/errgroup"
	"gonum.org/v1/gonum/stat"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/evaluation"
)

type evalCmd struct {
	Path       string        `arg:"" help:"Ensemble: a directory, all of whose manifests of one backbone are evaluated together, or one manifest."`
	Profile    []string      `sep:"none" placeholder:"SETTINGS" help:"Scoring profile; may be repeated. What it does not name is the manifest's. Defaults to the manifest's."`
	Seeds      int           `default:"8" help:"Requests of each class in each rotation. Defaults to 8."`
	ErrorSteps int           `default:"20" help:"Steps of the images whose errors scores are held against, at the manifest's guidance. Defaults to 20."`
	JSON       bool          `name:"json" help:"Print the results as JSON."`
	Out        string        `placeholder:"DIR" help:"Directory for results.json, results.md and the plots. Defaults to none."`
	Scoring    runtimeConfig `embed:"" prefix:"scoring." group:"Scoring"`
}

func (evalCmd) Help() string {
	return `Runs requests of every class through an ensemble and says how well its scores find under-sampled classes (class level), how well they rank the requests of one class by their error (request level), and what they cost in rows of U-Net work. Manifests beside each other that share the backbone are rotations: the same classes with other numbers of training images. Intervals are 95%, over resampled cells (a class in a rotation).

Examples:

  decuwatch eval ensembles/fashion-mnist
  decuwatch eval ensembles/fashion-mnist --seeds 4 --profile steps=10,guidance=1,request_risk=5+1:mean-w2 --profile steps=20 --out /tmp/evaluation
  decuwatch eval ensembles/fashion-mnist --json | jq '.scores[] | {settings, rows, within: .request_level.within}'

Keys of --profile: steps, guidance, eta, class_gap, request_risk; a measurement is BRANCH_STEP+ROLLOUT_STEPS:ESTIMATOR. Where steps changes and a measurement is not named, it keeps its relative place.`
}

// parseProfile reads "steps=10,guidance=2,class_gap=0+1:paide-w2"; what it does not name is the base's.
func parseProfile(text string, base scoring.Profile, d scoring.Diffusion) (scoring.Profile, error) {
	fields := map[string]string{}
	for field := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(field, "=")
		if !ok || !slices.Contains([]string{"steps", "guidance", "eta", string(schema.ClassGap), string(schema.RequestRisk)}, key) {
			return scoring.Profile{}, fmt.Errorf("%q is not one of steps=, guidance=, eta=, class_gap=, request_risk=", field)
		}
		if _, twice := fields[key]; twice {
			return scoring.Profile{}, fmt.Errorf("%s is given twice", key)
		}
		fields[key] = value
	}
	steps, guidance, eta := base.Steps, base.GuidanceScale, base.Eta
	var err error
	if v, ok := fields["steps"]; ok {
		if steps, err = strconv.Atoi(v); err != nil {
			return scoring.Profile{}, fmt.Errorf("steps: %w", err)
		}
	}
	for key, target := range map[string]*float64{"guidance": &guidance, "eta": &eta} {
		if v, ok := fields[key]; ok {
			if *target, err = strconv.ParseFloat(v, 64); err != nil {
				return scoring.Profile{}, fmt.Errorf("%s: %w", key, err)
			}
		}
	}
	p := base.WithSampler(d, steps, guidance, eta)
	p.Reason = ""
	for key, target := range map[schema.MeasurementName]*scoring.Measure{schema.ClassGap: &p.ClassGap, schema.RequestRisk: &p.RequestRisk} {
		v, ok := fields[string(key)]
		if !ok {
			continue
		}
		place, estimator, _ := strings.Cut(v, ":")
		branch, rollout, _ := strings.Cut(place, "+")
		m := scoring.Measure{Estimator: estimator}
		if m.BranchStep, err = strconv.Atoi(branch); err == nil {
			m.RolloutSteps, err = strconv.Atoi(rollout)
		}
		if err != nil {
			return scoring.Profile{}, fmt.Errorf("%s is %q, must be BRANCH_STEP+ROLLOUT_STEPS:ESTIMATOR", key, v)
		}
		*target = m
	}
	return p, p.Validate(d)
}

// rotations returns the manifests that path stands for: itself, or in a directory all that share the backbone of
// ensemble.json, that one first.
func rotations(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	first := filepath.Join(path, ensemble.ManifestName)
	backbone, err := backboneOf(first)
	if err != nil {
		return nil, err
	}
	if backbone == "" {
		return nil, fmt.Errorf("%s is not a manifest of format %s", first, ensemble.Format)
	}
	files, err := filepath.Glob(filepath.Join(path, "*.json"))
	if err != nil {
		return nil, err
	}
	manifests := []string{first}
	for _, file := range files { // sorted
		if file == first {
			continue
		}
		other, err := backboneOf(file)
		if err != nil {
			return nil, err
		}
		if other == backbone {
			manifests = append(manifests, file)
		}
	}
	return manifests, nil
}

// backboneOf returns the SHA-256 of a manifest's U-Net, or "" where the file is no manifest.
func backboneOf(file string) (string, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var m struct {
		Format string         `json:"format"`
		Files  ensemble.Files `json:"files"`
	}
	if err := json.Unmarshal(content, &m); err != nil || m.Format != ensemble.Format {
		return "", nil //nolint:nilerr // other JSON files may lie beside manifests
	}
	return m.Files.UNet.SHA256, nil
}

// evalResults is what an evaluation found.
type evalResults struct {
	Ensemble  string                `json:"ensemble"`
	Regime    string                `json:"regime"`
	Manifests []evalManifest        `json:"manifests"`
	Classes   int                   `json:"classes"`
	Seeds     int                   `json:"seeds"`
	Requests  int                   `json:"requests"` // of each score
	Bins      []float64             `json:"bins"`     // training images
	Error     *evalError            `json:"error"`    // null where the ensemble carries no reference table
	Scores    []evalScore           `json:"scores"`
	Random    evaluation.ClassLevel `json:"random_scores"` // the control
	cells     []evaluation.Cell
}

type evalManifest struct {
	File   string `json:"file"`
	Digest string `json:"digest"`
}

// evalError describes the errors of the requests: squared distances of the final latents to the one under the backbone's
// own fully trained table, averaged over the components.
type evalError struct {
	Steps    int                  `json:"steps"`
	Guidance float64              `json:"guidance_scale"`
	Means    []evaluation.BinMean `json:"mean_by_bin"`
}

// evalScore is one measurement of one profile.
type evalScore struct {
	Settings     string                   `json:"settings"` // of the sampler and the measurement
	Measurement  schema.MeasurementName   `json:"measurement"`
	Rows         int                      `json:"rows"` // of U-Net work, of this measurement alone
	ProfileRows  int                      `json:"profile_rows"`
	Saturated    float64                  `json:"saturated"` // share of scores at their upper bound
	ClassLevel   evaluation.ClassLevel    `json:"class_level"`
	RequestLevel *evaluation.RequestLevel `json:"request_level"`
	// MeanDistance is the control of PaiDE: the plain mean of the same pairwise distances.
	MeanDistance evalControl `json:"mean_distance"`

	values, distances [][]float64 // [cells][seeds]
	saturated         [][]float64 // 1 or 0, likewise
}

type evalControl struct {
	ClassLevel   evaluation.ClassLevel    `json:"class_level"`
	RequestLevel *evaluation.RequestLevel `json:"request_level"`
}

func (c *evalCmd) Run(ctx context.Context, s *streams, log *slog.Logger) error {
	if c.Seeds < 2 {
		return usage("seeds is %d, must be at least 2", c.Seeds)
	}
	paths, err := rotations(c.Path)
	if err != nil {
		return err
	}
	results, err := c.measure(ctx, s, log, paths)
	if err != nil {
		return err
	}
	if c.Out != "" {
		if err := results.write(c.Out); err != nil {
			return err
		}
	}
	if c.JSON {
		return writeJSON(s.out, results)
	}
	return results.print(s.out, textTable)
}

// measure runs every request under every profile, rotation by rotation, and judges the scores.
func (c *evalCmd) measure(ctx context.Context, s *streams, log *slog.Logger, paths []string) (*evalResults, error) {
	first, err := ensemble.Open(paths[0])
	if err != nil {
		return nil, err
	}
	var profiles []scoring.Profile
	for _, text := range c.Profile {
		p, err := parseProfile(text, first.Profile, first.Diffusion)
		if err != nil {
			return nil, usage("profile %q: %w", text, err)
		}
		profiles = append(profiles, p)
	}
	if len(profiles) == 0 {
		profiles = []scoring.Profile{first.Profile}
	}
	truth := first.Profile.WithSampler(first.Diffusion, c.ErrorSteps, first.Profile.GuidanceScale, 0)
	if err := truth.Validate(first.Diffusion); err != nil {
		return nil, usage("error-steps: %w", err)
	}
	results := &evalResults{Ensemble: first.Name, Regime: first.Regime, Classes: len(first.Classes), Seeds: c.Seeds}
	withError := first.ReferenceEmbedding(0) != nil
	n := len(paths) * len(first.Classes)
	work := len(profiles)
	if withError {
		work++
	}
	for _, p := range profiles {
		for name, m := range map[schema.MeasurementName]scoring.Measure{schema.ClassGap: p.ClassGap, schema.RequestRisk: p.RequestRisk} {
			settings := fmt.Sprintf("s=%d g=%g eta=%g %s", p.Steps, p.GuidanceScale, p.Eta, m)
			results.Scores = append(results.Scores, evalScore{Settings: settings, Measurement: name, values: matrix(n, c.Seeds), distances: matrix(n, c.Seeds), saturated: matrix(n, c.Seeds)})
		}
		if at := len(results.Scores); results.Scores[at-1].Measurement == schema.ClassGap { // class_gap first
			results.Scores[at-1], results.Scores[at-2] = results.Scores[at-2], results.Scores[at-1]
		}
	}
	errors := matrix(n, c.Seeds)
	bar := progress(s, n*c.Seeds*work, "evaluating")
	for rotation, path := range paths {
		err := c.rotation(ctx, log, path, func(ctx context.Context, engine *scoring.Engine, group *errgroup.Group) error {
			e := engine.Ensemble()
			if len(e.Classes) != len(first.Classes) || (e.ReferenceEmbedding(0) != nil) != withError {
				return fmt.Errorf("%s has other classes than %s, or only one of them a reference table", path, paths[0])
			}
			results.Manifests = append(results.Manifests, evalManifest{filepath.Base(path), e.Digest})
			for i, p := range profiles {
				for k, m := range []scoring.Measure{p.ClassGap, p.RequestRisk} {
					alone := p
					alone.ClassGap, alone.RequestRisk = m, m
					results.Scores[2*i+k].Rows = engine.Rows(scoring.Request{Profile: alone})
					results.Scores[2*i+k].ProfileRows = engine.Rows(scoring.Request{Profile: p})
				}
			}
			for class := range e.Classes {
				cell := len(results.cells)
				results.cells = append(results.cells, evaluation.Cell{Rotation: rotation, Class: class, Bin: meanOf(e.Classes[class].Images)})
				for seed := range c.Seeds {
					r := scoring.Request{
						Key: fmt.Sprintf("/decuwatch/eval\n%d-%d", class, seed), Class: class, Seed: uint64(seed), Priority: scoring.Background, //nolint:gosec // from 0
					}
					for i, p := range profiles {
						r := r
						r.Profile = p
						group.Go(func() error {
							result, err := engine.Score(ctx, r)
							if err != nil {
								return err
							}
							for k, m := range []scoring.Measurement{result.ClassGap, result.RequestRisk} {
								results.Scores[2*i+k].values[cell][seed] = m.Value
								results.Scores[2*i+k].distances[cell][seed] = m.MeanDistance
								if m.Saturated {
									results.Scores[2*i+k].saturated[cell][seed] = 1
								}
							}
							return bar.Add(1)
						})
					}
					if withError {
						r := r
						r.Profile = truth
						group.Go(func() error {
							rollout, err := engine.Rollout(ctx, r)
							if err != nil {
								return err
							}
							for _, latent := range rollout.Latents {
								errors[cell][seed] += evaluation.SquaredDistance(latent, rollout.Reference) / float64(len(rollout.Latents))
							}
							return bar.Add(1)
						})
					}
				}
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	_ = bar.Exit() // it only draws
	results.judge(first, errors, truth, withError)
	return results, nil
}

// rotation opens an engine, lets work start requests in the group, and waits for them.
func (c *evalCmd) rotation(ctx context.Context, log *slog.Logger, path string, work func(context.Context, *scoring.Engine, *errgroup.Group) error) error {
	engine, err := scoring.Open(path, scoring.Options{
		Library: c.Scoring.Library, Device: c.Scoring.Device, Threads: c.Scoring.Threads, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	defer func() {
		if err := engine.Close(); err != nil {
			log.Warn("ensemble was not closed", "err", err)
		}
	}()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(64) // requests in flight fill the runs
	began := work(ctx, engine, group)
	if err := group.Wait(); err != nil {
		return err
	}
	return began
}

// judge computes both levels of every score.
func (r *evalResults) judge(e *ensemble.Ensemble, errors [][]float64, truth scoring.Profile, withError bool) {
	r.Bins, r.Requests = evaluation.Bins(r.cells), len(r.cells)*r.Seeds
	requests := func(values [][]float64) *evaluation.RequestLevel {
		if !withError {
			return nil
		}
		level := evaluation.JudgeRequests(r.cells, values, errors)
		return &level
	}
	for i := range r.Scores {
		score := &r.Scores[i]
		score.ClassLevel, score.RequestLevel = evaluation.JudgeClasses(r.cells, score.values), requests(score.values)
		score.Saturated = stat.Mean(slices.Concat(score.saturated...), nil)
		score.MeanDistance = evalControl{evaluation.JudgeClasses(r.cells, score.distances), requests(score.distances)}
	}
	random, generator := matrix(len(r.cells), r.Seeds), rand.New(rand.NewPCG(1, 1)) //nolint:gosec // a control, not a secret
	for _, cell := range random {
		for i := range cell {
			cell[i] = generator.Float64()
		}
	}
	r.Random = evaluation.JudgeClasses(r.cells, random)
	if withError {
		r.Error = &evalError{Steps: truth.Steps, Guidance: truth.GuidanceScale, Means: evaluation.JudgeClasses(r.cells, errors).Means}
	}
}

func matrix(rows, columns int) [][]float64 {
	m := make([][]float64, rows)
	for i := range m {
		m[i] = make([]float64, columns)
	}
	return m
}

func meanOf(values []int) float64 {
	sum := 0
	for _, v := range values {
		sum += v
	}
	return float64(sum) / float64(max(1, len(values)))
}

// tables returns the results as titled tables, the first row of each its head.
func (r *evalResults) tables() (titles []string, tables [][][]string) {
	head := []string{"score", "rows", "bin", "AUROC", "AUPRC", "TPR at 1% FPR", "same class", "rho", "mean by bin", "saturated"}
	class := [][]string{head}
	add := func(name, rows, saturated string, level evaluation.ClassLevel) {
		var means []string
		for _, m := range level.Means {
			means = append(means, fmt.Sprintf("%.3g", m.Mean.Value))
		}
		line := []string{name, rows, "", "", "", "", "", optional(level.Rho, 2), strings.Join(means, " / "), saturated}
		for i, a := range level.Against {
			line[2], line[3], line[4], line[5] = fmt.Sprintf("%g v %g", a.Bin, r.Bins[len(r.Bins)-1]), interval(a.AUROC, 3), fmt.Sprintf("%.3f", a.AUPRC), fmt.Sprintf("%.2f", a.TPR)
			line[6] = "-"
			if a.SameClass != nil {
				line[6] = fmt.Sprintf("%.3f (%d of %d)", *a.SameClass, a.ClassesAt, a.Classes)
			}
			if i > 0 {
				line[0], line[1], line[7], line[8], line[9] = "", "", "", "", ""
			}
			class = append(class, slices.Clone(line))
		}
		if len(level.Against) == 0 {
			class = append(class, line)
		}
	}
	request := [][]string{{"score", "rows", "within class and bin", "by bin", "overall"}}
	rank := func(name, rows string, level *evaluation.RequestLevel) {
		if level == nil {
			return
		}
		within, byBin := "-", []string(nil)
		if level.Within != nil {
			within = interval(*level.Within, 2)
		}
		for _, b := range level.ByBin {
			byBin = append(byBin, optional(b.Within, 2))
		}
		request = append(request, []string{name, rows, within, strings.Join(byBin, " / "), optional(level.Overall, 2)})
	}
	for _, score := range r.Scores {
		name, rows := score.Settings, strconv.Itoa(score.Rows)
		add(name, rows, fmt.Sprintf("%.0f%%", 100*score.Saturated), score.ClassLevel)
		rank(name, rows, score.RequestLevel)
		if !strings.Contains(name, ensemble.MeanW2+"@") {
			add("  its mean distance", rows, "-", score.MeanDistance.ClassLevel)
			rank("  its mean distance", rows, score.MeanDistance.RequestLevel)
		}
	}
	add("random scores", "0", "-", r.Random)
	return []string{"Class level: does the score find under-sampled classes?", "Request level: does the score rank the requests of a class by their error?"}, [][][]string{class, request}
}

func interval(e evaluation.Estimate, digits int) string {
	return fmt.Sprintf("%.*f [%.*f, %.*f]", digits, e.Value, digits, e.Low, digits, e.High)
}

func optional(v *float64, digits int) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprintf("%.*f", digits, *v)
}

// print writes the results; table lays one table out.
func (r *evalResults) print(w io.Writer, table func(io.Writer, [][]string) error) error {
	titles, tables := r.tables()
	fmt.Fprintf(w, "%s (regime %s): %d rotations x %d classes x %d seeds = %d requests of each score; 95%% intervals over %d cells.\n",
		r.Ensemble, r.Regime, len(r.Manifests), r.Classes, r.Seeds, r.Requests, len(r.cells))
	for i, title := range titles {
		fmt.Fprintf(w, "\n%s\n\n", title)
		if len(tables[i]) == 1 {
			fmt.Fprintln(w, "The tables file holds no tensor \"reference\": without the fully trained table no request's error is known.")
			continue
		}
		if err := table(w, tables[i]); err != nil {
			return err
		}
	}
	if r.Error != nil {
		fmt.Fprintf(w, "\nError: squared distance of final latents to the one under the fully trained table, mean of the components; %d steps, guidance %g; mean by bin", r.Error.Steps, r.Error.Guidance)
		for i, m := range r.Error.Means {
			if i > 0 {
				fmt.Fprint(w, " /")
			}
			fmt.Fprintf(w, " %.3g", m.Mean.Value)
		}
		fmt.Fprintln(w, ".")
	}
	return nil
}

func textTable(w io.Writer, rows [][]string) error {
	out := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(out, strings.Join(row, "\t"))
	}
	return out.Flush()
}

func markdownTable(w io.Writer, rows [][]string) error {
	for i, row := range rows {
		fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			fmt.Fprintf(w, "|%s\n", strings.Repeat("---|", len(row)))
		}
	}
	return nil
}

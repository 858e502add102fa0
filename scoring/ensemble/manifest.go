// Package ensemble reads an ensemble directory: its manifest, its tables of class embeddings and the graphs of its
// backbone. It trusts nothing that the manifest does not say and needs no ONNX Runtime.
package ensemble

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/decuwatch/decuwatch/internal/modelname"
	"github.com/decuwatch/decuwatch/scoring/diffusion"
)

// Format is the version of the ensemble directory that this package reads; any other is refused.
const Format = "decuwatch-ensemble/1"

// Estimators of a measurement. The first three are PaiDE in nats, at most ln M, over the named distance between the
// components' predictive distributions.
const (
	PaiDEW2            = "paide-w2"            // squared 2-Wasserstein distance
	PaiDEKL            = "paide-kl"            // Kullback-Leibler divergence
	PaiDEBhattacharyya = "paide-bhattacharyya" // Bhattacharyya distance
	MeanW2             = "mean-w2"             // the mean pairwise squared 2-Wasserstein distance itself: unbounded
	PixelPaiDEW2       = "pixel-paide-w2"      // PaiDE of every latent position, averaged over the positions
)

// What a high score of an ensemble means.
const (
	RegimeExposure     = "exposure"     // how little the class was trained
	RegimeDisagreement = "disagreement" // how far the data leave the answer open
)

// Generators of the first latent.
const (
	NoiseTorchCPU  = "torch-cpu"
	NoiseTorchCUDA = "torch-cuda"
	NoiseDecuwatch = "decuwatch"
)

// Manifest is the content of ensemble.json; docs/ensemble-format.md describes every field and its bounds.
type Manifest struct {
	Format      string               `json:"format"`
	Name        string               `json:"name"`
	Files       Files                `json:"files"`
	Precision   string               `json:"precision"` // of the weights: fp32 or fp16
	Opset       int                  `json:"opset"`
	Latent      Latent               `json:"latent"`
	Image       Image                `json:"image"`
	Context     Context              `json:"context"`
	Graph       Graph                `json:"graph"`
	Diffusion   Diffusion            `json:"diffusion"`
	Components  int                  `json:"components"` // M
	Classes     []Class              `json:"classes"`
	Regime      string               `json:"regime"`
	Noise       string               `json:"noise"`
	Profile     Profile              `json:"profile"`
	Reference   map[string]Reference `json:"reference,omitempty"` // by measurement: class_gap, request_risk
	Provenance  json.RawMessage      `json:"provenance"`
	Diagnostics json.RawMessage      `json:"diagnostics"`
}

// Files are the files beside the manifest.
type Files struct {
	UNet    File `json:"unet"`
	Decoder File `json:"decoder"`
	Tables  File `json:"tables"`
}

// File is one file of the directory.
type File struct {
	Path     string `json:"path"` // a base name
	Size     int64  `json:"size"` // bytes
	SHA256   string `json:"sha256"`
	External []File `json:"external,omitempty"` // ONNX external data files of a graph
}

// Latent is the shape of a latent; the decoder is given latent / Scale + Shift.
type Latent struct {
	Channels int     `json:"channels"`
	Height   int     `json:"height"`
	Width    int     `json:"width"`
	Scale    float64 `json:"scale"`
	Shift    float64 `json:"shift"`
}

// Size returns the number of elements of a latent.
func (l Latent) Size() int { return l.Channels * l.Height * l.Width }

// Image is the shape of a decoded image, whose values lie in [-1, 1].
type Image struct {
	Channels int `json:"channels"`
	Height   int `json:"height"`
	Width    int `json:"width"`
}

// Size returns the number of elements of an image.
func (i Image) Size() int { return i.Channels * i.Height * i.Width }

// Context is the shape of a class embedding.
type Context struct {
	Tokens int `json:"tokens"`
	Dim    int `json:"dim"`
}

// Size returns the number of elements of a class embedding.
func (c Context) Size() int { return c.Tokens * c.Dim }

// Graph names the inputs and outputs of the two graphs.
type Graph struct {
	UNet struct {
		Latent   string `json:"latent"`
		Timestep string `json:"timestep"`
		Context  string `json:"context"`
		Output   string `json:"output"`
	} `json:"unet"`
	Decoder struct {
		Latent string `json:"latent"`
		Output string `json:"output"`
	} `json:"decoder"`
}

// Diffusion holds the conventions of the forward process and of the timesteps.
type Diffusion = diffusion.Config

// Class is one class, in index order.
type Class struct {
	Label  string `json:"label"`
	Images []int  `json:"images"` // training images of the class that each component saw
}

// ImageCount returns "5000", or "1 to 100" if the components saw different numbers of images.
func (c Class) ImageCount() string {
	if len(c.Images) == 0 {
		return "-"
	}
	least, most := slices.Min(c.Images), slices.Max(c.Images)
	if least == most {
		return fmt.Sprint(least)
	}
	return fmt.Sprintf("%d to %d", least, most)
}

// Measure says at which step the components leave the shared path, how many steps they take, and how their distance is
// estimated.
type Measure struct {
	BranchStep   int    `json:"branch_step"`   // b: the carrying component does the steps before it
	RolloutSteps int    `json:"rollout_steps"` // r: steps that each component takes on its own path
	Estimator    string `json:"estimator"`
}

// Profile is the sampler and the two measurements of a score. The zero value stands for "not given".
type Profile struct {
	Steps         int     `json:"steps"`          // S, as a sampler is asked for them: Diffusion.StepCount are taken
	GuidanceScale float64 `json:"guidance_scale"` // at exactly 1 the unconditional rows are not computed
	Eta           float64 `json:"eta"`
	ClassGap      Measure `json:"class_gap"`
	RequestRisk   Measure `json:"request_risk"`
	Reason        string  `json:"reason"`
}

// Reference holds scores of well-sampled classes under the profile.
type Reference struct {
	N         int                `json:"n"`
	Mean      float64            `json:"mean"`
	Quantiles map[string]float64 `json:"quantiles"`
}

// Settings returns the canonical key of the sampler and of both measurements. Scores are comparable, and a threshold
// applies, only if it is equal. Example: "ddim s=20 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@10+1":
// 10+1 stands for branch step 10 and one roll-out step.
func (p Profile) Settings() string {
	number := func(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
	return fmt.Sprintf("ddim s=%d g=%s eta=%s class_gap=%s request_risk=%s",
		p.Steps, number(p.GuidanceScale), number(p.Eta), p.ClassGap, p.RequestRisk)
}

// String returns estimator@branch+rollout.
func (m Measure) String() string {
	return fmt.Sprintf("%s@%d+%d", m.Estimator, m.BranchStep, m.RolloutSteps)
}

// WithSampler returns the profile with another sampler. The branch steps keep their relative place (rounded to the
// nearest step), a roll-out to the end stays one, a single step stays single, any other keeps its share of the steps.
// The ensemble's diffusion says how many steps both samplers take.
func (p Profile) WithSampler(d Diffusion, steps int, guidanceScale, eta float64) Profile {
	from, to := d.StepCount(p.Steps), d.StepCount(steps)
	scale := func(m Measure) Measure {
		if from < 1 || to < 1 {
			return m
		}
		ratio := float64(to) / float64(from)
		branch := min(int(math.Round(float64(m.BranchStep)*ratio)), to-1)
		rollout := max(1, int(math.Round(float64(m.RolloutSteps)*ratio)))
		switch m.RolloutSteps {
		case 1:
			rollout = 1
		case from - m.BranchStep:
			rollout = to - branch
		}
		m.BranchStep, m.RolloutSteps = branch, min(rollout, to-branch)
		return m
	}
	q := p
	q.Steps, q.GuidanceScale, q.Eta = steps, guidanceScale, eta
	q.ClassGap, q.RequestRisk = scale(p.ClassGap), scale(p.RequestRisk)
	return q
}

// Validate returns an error that names the field that is out of its bounds, or that a sampler of the ensemble's
// diffusion cannot follow.
func (p Profile) Validate(d Diffusion) error {
	switch {
	case p.Steps < 1 || p.Steps > 1000:
		return fmt.Errorf("steps is %d, must be 1 to 1000", p.Steps)
	case !(p.GuidanceScale >= 0 && p.GuidanceScale <= 30):
		return fmt.Errorf("guidance_scale is %v, must be 0 to 30", p.GuidanceScale)
	case !(p.Eta >= 0 && p.Eta <= 1):
		return fmt.Errorf("eta is %v, must be 0 to 1", p.Eta)
	}
	steps, err := diffusion.Steps(d, p.Steps, p.Eta)
	if err != nil {
		return err
	}
	if err := p.ClassGap.Validate(len(steps)); err != nil {
		return fmt.Errorf("class_gap.%w", err)
	}
	if err := p.RequestRisk.Validate(len(steps)); err != nil {
		return fmt.Errorf("request_risk.%w", err)
	}
	return nil
}

// Validate returns an error that names the field which does not fit a sampler that takes the given steps.
func (m Measure) Validate(steps int) error {
	switch {
	case m.BranchStep < 0 || m.BranchStep >= steps:
		return fmt.Errorf("branch_step is %d, must be 0 to %d", m.BranchStep, steps-1)
	case m.RolloutSteps < 1 || m.RolloutSteps > steps-m.BranchStep:
		return fmt.Errorf("rollout_steps is %d, must be 1 to %d", m.RolloutSteps, steps-m.BranchStep)
	}
	return oneOf("estimator", m.Estimator, PaiDEW2, PaiDEKL, PaiDEBhattacharyya, MeanW2, PixelPaiDEW2)
}

var digestFormat = regexp.MustCompile(`^[0-9a-f]{64}$`)

// maxElements bounds a latent, an image and a class embedding, so that products of bounded sides stay allocatable.
const maxElements = 1 << 24

// validate returns an error that names the first field out of its bounds.
func (m *Manifest) validate() error {
	if m.Format != Format {
		return fmt.Errorf("format is %q, this reader knows %q", m.Format, Format)
	}
	if !modelname.Valid(m.Name) {
		return fmt.Errorf("name is %q, must be %s", m.Name, modelname.Rule)
	}
	for _, check := range []func() error{m.validateFiles, m.validateShapes, m.validateGraph} {
		if err := check(); err != nil {
			return err
		}
	}
	if err := m.Diffusion.Validate(); err != nil {
		return fmt.Errorf("diffusion.%w", err)
	}
	if err := m.validateClasses(); err != nil {
		return err
	}
	if err := oneOf("regime", m.Regime, RegimeExposure, RegimeDisagreement); err != nil {
		return err
	}
	if err := oneOf("noise", m.Noise, NoiseTorchCPU, NoiseTorchCUDA, NoiseDecuwatch); err != nil {
		return err
	}
	if err := m.Profile.Validate(m.Diffusion); err != nil {
		return fmt.Errorf("profile.%w", err)
	}
	for name, reference := range m.Reference {
		if err := reference.validate(name); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manifest) validateFiles() error {
	if len(m.Files.Tables.External) > 0 {
		return errors.New("files.tables.external: only a graph has external data")
	}
	paths := map[string]bool{}
	for _, f := range []struct {
		name string
		file File
	}{{"files.unet", m.Files.UNet}, {"files.decoder", m.Files.Decoder}, {"files.tables", m.Files.Tables}} {
		if err := f.file.validate(f.name, paths); err != nil {
			return err
		}
	}
	return oneOf("precision", m.Precision, "fp32", "fp16")
}

func (m *Manifest) validateShapes() error {
	for _, bound := range []struct {
		name      string
		value     int
		low, high int
	}{
		{"opset", m.Opset, 13, 22},
		{"latent.channels", m.Latent.Channels, 1, 1024},
		{"latent.height", m.Latent.Height, 1, 1024},
		{"latent.width", m.Latent.Width, 1, 1024},
		{"image.height", m.Image.Height, 1, 8192},
		{"image.width", m.Image.Width, 1, 8192},
		{"context.tokens", m.Context.Tokens, 1, 1024},
		{"context.dim", m.Context.Dim, 1, 8192},
		{"components", m.Components, 2, 64},
		{"classes (their number)", len(m.Classes), 1, 100_000},
		{"elements of a latent", m.Latent.Size(), 1, maxElements},
		{"elements of an image", m.Image.Size(), 1, maxElements},
		{"elements of a class embedding", m.Context.Size(), 1, maxElements},
	} {
		if bound.value < bound.low || bound.value > bound.high {
			return fmt.Errorf("%s is %d, must be %d to %d", bound.name, bound.value, bound.low, bound.high)
		}
	}
	if m.Image.Channels != 1 && m.Image.Channels != 3 {
		return fmt.Errorf("image.channels is %d, must be 1 or 3", m.Image.Channels)
	}
	if !(m.Latent.Scale > 0) || math.IsInf(m.Latent.Scale, 0) {
		return fmt.Errorf("latent.scale is %v, must be positive", m.Latent.Scale)
	}
	return nil
}

func (m *Manifest) validateGraph() error {
	for _, port := range []struct{ name, value string }{
		{"graph.unet.latent", m.Graph.UNet.Latent},
		{"graph.unet.timestep", m.Graph.UNet.Timestep},
		{"graph.unet.context", m.Graph.UNet.Context},
		{"graph.unet.output", m.Graph.UNet.Output},
		{"graph.decoder.latent", m.Graph.Decoder.Latent},
		{"graph.decoder.output", m.Graph.Decoder.Output},
	} {
		if port.value == "" || len(port.value) > 256 {
			return fmt.Errorf("%s is %q, must be 1 to 256 characters", port.name, port.value)
		}
	}
	return nil
}

func (m *Manifest) validateClasses() error {
	labels := make(map[string]bool, len(m.Classes))
	for i, class := range m.Classes {
		if n := len([]rune(class.Label)); n < 1 || n > 128 {
			return fmt.Errorf("classes[%d].label has %d characters, must have 1 to 128", i, n)
		}
		if labels[class.Label] {
			return fmt.Errorf("classes[%d].label %q is not unique", i, class.Label)
		}
		labels[class.Label] = true
		if len(class.Images) != m.Components {
			return fmt.Errorf("classes[%d].images has %d numbers, must have one for each of the %d components",
				i, len(class.Images), m.Components)
		}
		if n := slices.Min(class.Images); n < 0 {
			return fmt.Errorf("classes[%d].images has %d, must not be negative", i, n)
		}
	}
	return nil
}

func (r Reference) validate(measurement string) error {
	if err := oneOf("reference", measurement, "class_gap", "request_risk"); err != nil {
		return err
	}
	if r.N < 1 {
		return fmt.Errorf("reference.%s.n is %d, must be at least 1", measurement, r.N)
	}
	for q := range r.Quantiles {
		if v, err := strconv.ParseFloat(q, 64); err != nil || !(v > 0 && v < 1) {
			return fmt.Errorf("reference.%s.quantiles has %q, must be a number between 0 and 1", measurement, q)
		}
	}
	return nil
}

func (f File) validate(name string, paths map[string]bool) error {
	switch {
	case f.Path == "" || f.Path == "." || f.Path == ".." || len(f.Path) > 255 || strings.ContainsAny(f.Path, "/\\\x00"):
		return fmt.Errorf("%s.path is %q, must be the name of a file in the directory", name, f.Path)
	case paths[f.Path]:
		return fmt.Errorf("%s.path %q is named twice", name, f.Path)
	case f.Size < 1:
		return fmt.Errorf("%s.size is %d, must be positive", name, f.Size)
	case !digestFormat.MatchString(f.SHA256):
		return fmt.Errorf("%s.sha256 is %q, must be 64 lower-case hexadecimal digits", name, f.SHA256)
	}
	paths[f.Path] = true
	for i, external := range f.External {
		if len(external.External) > 0 {
			return fmt.Errorf("%s.external[%d].external: external data cannot have external data of its own", name, i)
		}
		if err := external.validate(fmt.Sprintf("%s.external[%d]", name, i), paths); err != nil {
			return err
		}
	}
	return nil
}

func oneOf(name, value string, allowed ...string) error {
	if slices.Contains(allowed, value) {
		return nil
	}
	return fmt.Errorf("%s is %q, must be one of %s", name, value, strings.Join(allowed, ", "))
}

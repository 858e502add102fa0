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

// Formats of the ensemble directory that this package reads; any other is refused.
const (
	Format1 = "decuwatch-ensemble/1" // members only, one number of steps for both measurements
	Format2 = "decuwatch-ensemble/2"
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

// Manifest is the content of ensemble.json; docs/ensemble-format.md describes every field and its bounds. A field with
// the tag format is in manifests of that format only.
type Manifest struct {
	Format    string  `json:"format"`
	Name      string  `json:"name"`
	Files     Files   `json:"files"`
	Precision string  `json:"precision"` // of the weights: fp32 or fp16
	Opset     int     `json:"opset"`
	Latent    Latent  `json:"latent"`
	Image     Image   `json:"image"`
	Context   Context `json:"context"`
	Graph     Graph   `json:"graph"`
	// Conditioning are further inputs of the backbone beside the context, with a row of their own for each class.
	Conditioning []Conditioning       `json:"conditioning,omitempty" format:"2"`
	Diffusion    Diffusion            `json:"diffusion"`
	Components   int                  `json:"components"`           // M
	Posterior    int                  `json:"posterior" format:"2"` // P, or 0: no posterior tables
	Classes      []Class              `json:"classes"`
	Regime       string               `json:"regime"`
	Noise        string               `json:"noise"`
	Profile      Profile              `json:"profile"`
	Judge        *Judge               `json:"judge,omitempty" format:"2"`
	Reference    map[string]Reference `json:"reference,omitempty"` // by measurement
	Provenance   json.RawMessage      `json:"provenance"`
	Diagnostics  json.RawMessage      `json:"diagnostics"`
}

// Files are the files beside the manifest.
type Files struct {
	UNet    File  `json:"unet"`
	Decoder File  `json:"decoder"`
	Tables  File  `json:"tables"`
	Judge   *File `json:"judge,omitempty" format:"2"` // of Manifest.Judge
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

// Conditioning is a named input of the backbone, such as a pooled text embedding or the time ids of SDXL.
type Conditioning struct {
	Name  string `json:"name"`  // of its tensors: the set's and this name, with a dot between
	Input string `json:"input"` // of the graph, float32
	Shape []int  `json:"shape"` // of a row; no sides for a single number
}

// Size returns the number of elements of a row.
func (c Conditioning) Size() int {
	size := 1
	for _, side := range c.Shape {
		size *= side
	}
	return size
}

// Graph names the inputs and outputs of backbone and decoder.
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
	Images []int  `json:"images"`           // training images of the class that each component saw
	Draws  int    `json:"draws" format:"2"` // training examples that the producer's row was drawn for
	// ClassGap is the closed form's mean pairwise squared distance at the profile's class_gap; nil if unknown.
	ClassGap *float64   `json:"class_gap,omitempty" format:"2"`
	Data     *ClassData `json:"data,omitempty" format:"2"` // nil if nobody inspected the images
}

// ClassData is what the data card says of the training images of a class.
type ClassData struct {
	Images              int     `json:"images"`
	Distinct            int     `json:"distinct"`              // without exact duplicates
	NEff                float64 `json:"n_eff"`                 // images as far as they differ, at most Images
	NearDuplicates      int     `json:"near_duplicates"`       // images in a group of near duplicates
	NearDuplicateGroups int     `json:"near_duplicate_groups"` //
	// NeighborLabelShare is the share of nearest neighbors that have the same label, 0 to 1; nil if it was not measured.
	NeighborLabelShare *float64 `json:"neighbor_label_share"`
	LikelyMislabeled   int      `json:"likely_mislabeled"` // images whose neighbors have another label
	Outliers           int      `json:"outliers"`
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

// Reference holds scores of well-sampled classes under the profile.
type Reference struct {
	N         int                `json:"n"`
	Mean      float64            `json:"mean"`
	Quantiles map[string]float64 `json:"quantiles"`
}

var digestFormat = regexp.MustCompile(`^[0-9a-f]{64}$`)

// maxElements bounds a latent, an image and a class embedding, so that products of bounded sides stay allocatable.
const maxElements = 1 << 24

// validate returns an error that names the first field out of its bounds.
func (m *Manifest) validate() error {
	if !modelname.Valid(m.Name) {
		return fmt.Errorf("name is %q, must be %s", m.Name, modelname.Rule)
	}
	for _, check := range []func() error{m.validateFiles, m.validateShapes, m.validateGraph,
		m.validateConditioning} {
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
	if err := m.validateJudge(); err != nil {
		return err
	}
	if m.Format == Format1 { // which names the steps of all measurements at once
		if _, err := stepsTaken(m.Diffusion, m.Profile.ClassGap.Steps, m.Profile.Eta); err != nil {
			return fmt.Errorf("profile.%w", err)
		}
	}
	if err := m.Profile.Validate(m); err != nil {
		return fmt.Errorf("profile.%w", err)
	}
	for name, reference := range m.Reference {
		if err := reference.validate(name, m.Profile); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manifest) validateFiles() error {
	if len(m.Files.Tables.External) > 0 {
		return errors.New("files.tables.external: only a graph has external data")
	}
	type named struct {
		name string
		file File
	}
	files := []named{
		{"files.unet", m.Files.UNet}, {"files.decoder", m.Files.Decoder}, {"files.tables", m.Files.Tables},
	}
	if m.Files.Judge != nil {
		files = append(files, named{"files.judge", *m.Files.Judge})
	}
	paths := map[string]bool{}
	for _, f := range files {
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
	if m.Posterior != 0 && (m.Posterior < 2 || m.Posterior > 64) {
		return fmt.Errorf("posterior is %d, must be 0 or 2 to 64", m.Posterior)
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
		if err := validatePort(port.name, port.value); err != nil {
			return err
		}
	}
	return nil
}

var conditioningName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

// Bounds of the conditioning.
const (
	maxConditioning      = 8
	maxConditioningSides = 3
	maxConditioningSide  = 8192
)

func (m *Manifest) validateConditioning() error {
	if n := len(m.Conditioning); n > maxConditioning {
		return fmt.Errorf("conditioning has %d inputs, the most is %d", n, maxConditioning)
	}
	names, inputs := map[string]bool{}, map[string]bool{
		m.Graph.UNet.Latent: true, m.Graph.UNet.Timestep: true, m.Graph.UNet.Context: true,
	}
	for i, c := range m.Conditioning {
		field := fmt.Sprintf("conditioning[%d]", i)
		if !conditioningName.MatchString(c.Name) {
			return fmt.Errorf("%s.name is %q, must be 1 to 64 of a-z 0-9 _, beginning with a letter", field, c.Name)
		}
		if err := validatePort(field+".input", c.Input); err != nil {
			return err
		}
		if names[c.Name] || inputs[c.Input] {
			return fmt.Errorf("%s: name %q or input %q is there twice", field, c.Name, c.Input)
		}
		names[c.Name], inputs[c.Input] = true, true
		if err := c.validateShape(); err != nil {
			return fmt.Errorf("%s.%w", field, err)
		}
	}
	return nil
}

func (c Conditioning) validateShape() error {
	if len(c.Shape) > maxConditioningSides {
		return fmt.Errorf("shape is %v, must have at most %d sides", c.Shape, maxConditioningSides)
	}
	size := 1
	for _, side := range c.Shape {
		if side < 1 || side > maxConditioningSide {
			return fmt.Errorf("shape is %v, each side must be 1 to %d", c.Shape, maxConditioningSide)
		}
		if size *= side; size > maxElements {
			return fmt.Errorf("shape is %v, must have at most %d elements", c.Shape, maxElements)
		}
	}
	return nil
}

// validatePort checks the name of an input or output of a graph.
func validatePort(field, name string) error {
	if name == "" || len(name) > 256 {
		return fmt.Errorf("%s is %q, must be 1 to 256 characters", field, name)
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
		if err := class.validate(); err != nil {
			return fmt.Errorf("classes[%d].%w", i, err)
		}
	}
	return nil
}

// validate checks what format 2 says of a class.
func (c Class) validate() error {
	if c.Draws < 0 {
		return fmt.Errorf("draws is %d, must not be negative", c.Draws)
	}
	if c.ClassGap != nil && !(*c.ClassGap > 0 && *c.ClassGap <= math.MaxFloat64) {
		return fmt.Errorf("class_gap is %v, must be positive", *c.ClassGap)
	}
	if c.Data == nil {
		return nil
	}
	d := c.Data
	if d.Images < 0 {
		return fmt.Errorf("data.images is %d, must not be negative", d.Images)
	}
	for _, count := range []struct {
		name        string
		value, most float64
	}{
		{"distinct", float64(d.Distinct), float64(d.Images)},
		{"n_eff", d.NEff, float64(d.Images) * (1 + 1e-9)}, // 1 / (1 / n) may round up
		{"near_duplicates", float64(d.NearDuplicates), float64(d.Images)},
		{"near_duplicate_groups", float64(d.NearDuplicateGroups), float64(d.NearDuplicates)},
		{"likely_mislabeled", float64(d.LikelyMislabeled), float64(d.Images)},
		{"outliers", float64(d.Outliers), float64(d.Images)},
	} {
		if !(count.value >= 0 && count.value <= count.most) {
			return fmt.Errorf("data.%s is %v, must be 0 to %v", count.name, count.value, count.most)
		}
	}
	if share := d.NeighborLabelShare; share != nil && !(*share >= 0 && *share <= 1) {
		return fmt.Errorf("data.neighbor_label_share is %v, must be 0 to 1", *share)
	}
	return nil
}

func (r Reference) validate(measurement string, p Profile) error {
	allowed := []string{"class_gap", "request_risk"}
	if p.ImageRisk != (Measure{}) {
		allowed = append(allowed, "image_risk")
	}
	if err := oneOf("reference", measurement, allowed...); err != nil {
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

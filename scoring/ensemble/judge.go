package ensemble

import (
	"errors"
	"fmt"
	"math"
)

// Rules by which a judge's input is made from a decoded image.
const (
	ResizeNone     = "none"     // the judge takes images of the ensemble's size
	ResizeBilinear = "bilinear" // half-pixel centers, no antialiasing, edges clamped: as torch's interpolate
)

// Judge is a classifier of decoded images: image [N, Channels, Height, Width] -> logits [N, len(Outputs)].
type Judge struct {
	Input    string     `json:"input"`
	Output   string     `json:"output"`
	Channels int        `json:"channels"`
	Height   int        `json:"height"`
	Width    int        `json:"width"`
	Range    [2]float64 `json:"range"` // to which [-1, 1] of a decoded image is mapped
	Resize   string     `json:"resize"`
	// Outputs are the classes for which the logits stand, -1 for no class. Probabilities of one class add up.
	Outputs []int `json:"outputs"`
	// Accuracy is by class, on HeldOut images that the judge was not trained on; nil if it was not measured.
	Accuracy []*float64 `json:"accuracy"`
	HeldOut  []int      `json:"held_out"`
	// LeastAccuracy is the accuracy below which the judge cannot tell a class.
	LeastAccuracy float64 `json:"least_accuracy"`
	Measured      string  `json:"measured"` // one sentence: on what
}

// CanTell reports whether the judge was measured to tell a class well enough.
func (j *Judge) CanTell(class int) bool {
	return j.Accuracy[class] != nil && *j.Accuracy[class] >= j.LeastAccuracy
}

// ReadJudge returns the judge of a document that holds a manifest's judge object alone, for images and classes of an
// ensemble. It checks the document as Open does, and the inputs, outputs, types and shapes of the graph.
func ReadJudge(document, content []byte, e *Manifest) (*Judge, error) {
	j := &Judge{}
	if err := decodeStrict(document, j, "2"); err != nil {
		return nil, err
	}
	if err := j.validate(e); err != nil {
		return nil, err
	}
	g, err := parseGraph(content)
	if err != nil {
		return nil, err
	}
	return j, g.check(int(g.opset), File{}, j.inputs(), j.outputs())
}

// validateJudge returns an error that names the first field of the judge that does not fit the ensemble.
func (m *Manifest) validateJudge() error {
	j := m.Judge
	switch {
	case j == nil && m.Files.Judge == nil:
		return nil
	case j == nil:
		return errors.New("files.judge is given without judge")
	case m.Files.Judge == nil:
		return errors.New("judge is given without files.judge")
	}
	if err := j.validate(m); err != nil {
		return fmt.Errorf("judge.%w", err)
	}
	return nil
}

func (j *Judge) validate(e *Manifest) error {
	if err := j.validateInput(e.Image); err != nil {
		return err
	}
	return j.validateOutput(len(e.Classes))
}

func (j *Judge) inputs() []port {
	return []port{{j.Input, onnxFloat, []int64{-1, int64(j.Channels), int64(j.Height), int64(j.Width)}}}
}

func (j *Judge) outputs() []port {
	return []port{{j.Output, onnxFloat, []int64{-1, int64(len(j.Outputs))}}}
}

func (j *Judge) validateInput(image Image) error {
	for _, port := range []struct{ name, value string }{{"input", j.Input}, {"output", j.Output}} {
		if err := validatePort(port.name, port.value); err != nil {
			return err
		}
	}
	for _, side := range []struct {
		name  string
		value int
	}{{"height", j.Height}, {"width", j.Width}} {
		if side.value < 1 || side.value > 8192 {
			return fmt.Errorf("%s is %d, must be 1 to 8192", side.name, side.value)
		}
	}
	if err := oneOf("resize", j.Resize, ResizeNone, ResizeBilinear); err != nil {
		return err
	}
	low, high := j.Range[0], j.Range[1]
	switch {
	case j.Channels != image.Channels:
		return fmt.Errorf("channels is %d, must be %d as of the image", j.Channels, image.Channels)
	case j.Channels*j.Height*j.Width > maxElements:
		return fmt.Errorf("height %d and width %d are too large", j.Height, j.Width)
	case j.Resize == ResizeNone && (j.Height != image.Height || j.Width != image.Width):
		return fmt.Errorf("resize is %q, but the judge takes %d x %d and the image has %d x %d", j.Resize, j.Height,
			j.Width, image.Height, image.Width)
	case !(low < high) || math.Abs(low) > math.MaxFloat32 || math.Abs(high) > math.MaxFloat32:
		return fmt.Errorf("range is %v, must be two ascending numbers", j.Range)
	}
	return nil
}

func (j *Judge) validateOutput(classes int) error {
	if n := len(j.Outputs); n < 2 || n > 100_000 {
		return fmt.Errorf("outputs has %d numbers, must have 2 to 100000", n)
	}
	told := make([]bool, classes)
	for i, class := range j.Outputs {
		if class < -1 || class >= classes {
			return fmt.Errorf("outputs[%d] is %d, must be -1 to %d", i, class, classes-1)
		}
		if class >= 0 {
			told[class] = true
		}
	}
	if len(j.Accuracy) != classes {
		return fmt.Errorf("accuracy has %d numbers, must have one for each of the %d classes", len(j.Accuracy), classes)
	}
	if len(j.HeldOut) != classes {
		return fmt.Errorf("held_out has %d numbers, must have one for each of the %d classes", len(j.HeldOut), classes)
	}
	for i, accuracy := range j.Accuracy {
		switch {
		case j.HeldOut[i] < 0:
			return fmt.Errorf("held_out[%d] is %d, must not be negative", i, j.HeldOut[i])
		case accuracy == nil:
		case !(*accuracy >= 0 && *accuracy <= 1):
			return fmt.Errorf("accuracy[%d] is %v, must be 0 to 1", i, *accuracy)
		case !told[i]:
			return fmt.Errorf("accuracy[%d] is %v, but no output stands for the class", i, *accuracy)
		case j.HeldOut[i] == 0:
			return fmt.Errorf("accuracy[%d] is %v, but held_out[%d] is 0", i, *accuracy, i)
		}
	}
	if !(j.LeastAccuracy >= 0 && j.LeastAccuracy <= 1) {
		return fmt.Errorf("least_accuracy is %v, must be 0 to 1", j.LeastAccuracy)
	}
	if n := len([]rune(j.Measured)); n < 1 || n > 1000 {
		return fmt.Errorf("measured has %d characters, must have 1 to 1000", n)
	}
	return nil
}

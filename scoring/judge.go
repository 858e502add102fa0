package scoring

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/ort"
)

// judge is a judge's session with the rules of its input and its output.
type judge struct {
	stage
	*eye
	rules   *ensemble.Judge
	classes int
}

// newJudge returns the judge of images, whose graph is open as a stage.
func newJudge(opened stage, rules *ensemble.Judge, image ensemble.Image, classes int) *judge {
	return &judge{stage: opened, eye: newEye(image, rules), rules: rules, classes: classes}
}

// judgePorts returns the ports of a judge's graph.
func judgePorts(rules *ensemble.Judge) (input, output ort.Port) {
	return ort.Port{Name: rules.Input, Shape: []int64{int64(rules.Channels), int64(rules.Height), int64(rules.Width)}},
		ort.Port{Name: rules.Output, Shape: []int64{int64(len(rules.Outputs))}}
}

// put makes an image the row i of the next run.
func (j *judge) put(i int, image []float32) {
	n := j.size()
	j.look(j.input[i*n:(i+1)*n], image)
}

// read returns the probabilities of the classes for the row i of the last run.
func (j *judge) read(i int) ([]float64, error) {
	n := len(j.rules.Outputs)
	logits := j.output[i*n : (i+1)*n]
	if !finite(logits) {
		return nil, &NonFiniteError{Graph: "judge"}
	}
	return probabilities(logits, j.rules.Outputs, j.classes), nil
}

// Judge judges images apart from an engine. It is safe for concurrent use; Close releases it.
type Judge struct {
	mu      sync.Mutex
	judge   *judge
	session *ort.Session
}

// OpenJudge loads a judge of images of the ensemble's size and classes that [ensemble.ReadJudge] has checked.
func OpenJudge(rules *ensemble.Judge, graph []byte, e *ensemble.Manifest, o Options) (*Judge, error) {
	o, err := o.complete()
	if err != nil {
		return nil, fmt.Errorf("open judge: %w", err)
	}
	library, err := ort.FindLibrary(o.Library)
	if err != nil {
		return nil, err
	}
	if err := ort.Load(library); err != nil {
		return nil, err
	}
	input, output := judgePorts(rules)
	session, err := ort.NewSession(o.session(false, imageRows),
		ort.Graph{Content: graph, Inputs: []ort.Port{input}, Output: output})
	if err != nil {
		return nil, fmt.Errorf("open judge: %w", err)
	}
	opened := stage{runner: session, input: session.Input(0), output: session.Output()}
	return &Judge{judge: newJudge(opened, rules, e.Image, len(e.Classes)), session: session}, nil
}

// Probabilities returns the probabilities of the classes for each image. The error is a *NonFiniteError if the judge
// gave a NaN or an infinity.
func (j *Judge) Probabilities(images [][]float32) ([][]float64, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	var list [][]float64
	for images := range slices.Chunk(images, imageRows) {
		for i, image := range images {
			j.judge.put(i, image)
		}
		if err := j.judge.Run(len(images)); err != nil {
			return nil, fmt.Errorf("judge: %w", err)
		}
		for i := range images {
			p, err := j.judge.read(i)
			if err != nil {
				return nil, err
			}
			list = append(list, p)
		}
	}
	return list, nil
}

// Close releases the session.
func (j *Judge) Close() error { return j.session.Close() }

// eye makes a judge's input from a decoded image: clipped to [-1, 1], mapped to the judge's range, resized.
type eye struct {
	channels   int
	low, scale float64 // low + scale * (v + 1)
	rows       axis
	columns    axis
}

// axis says from which two pixels of an image each pixel of the judge's input is interpolated along one side.
type axis struct {
	from    int // pixels of the image
	low     []int
	high    []int
	portion []float64 // of high
}

// newAxis returns the axis of bilinear interpolation with half-pixel centers, without antialiasing, edges clamped: as
// torch.nn.functional.interpolate with align_corners=False.
func newAxis(from, to int) axis {
	a := axis{from, make([]int, to), make([]int, to), make([]float64, to)}
	for i := range to {
		at := max(0, (float64(i)+0.5)*float64(from)/float64(to)-0.5)
		a.low[i] = min(int(at), from-1)
		a.high[i] = min(a.low[i]+1, from-1)
		a.portion[i] = at - float64(a.low[i])
	}
	return a
}

func newEye(image ensemble.Image, j *ensemble.Judge) *eye {
	return &eye{channels: image.Channels, low: j.Range[0], scale: (j.Range[1] - j.Range[0]) / 2,
		rows: newAxis(image.Height, j.Height), columns: newAxis(image.Width, j.Width)}
}

// size returns the number of elements of the judge's input.
func (e *eye) size() int { return e.channels * len(e.rows.low) * len(e.columns.low) }

// look writes the judge's input of an image to dst.
func (e *eye) look(dst, image []float32) {
	i := 0
	for c := range e.channels {
		plane := image[c*e.rows.from*e.columns.from:]
		at := func(y, x int) float64 { return min(max(float64(plane[y*e.columns.from+x]), -1), 1) }
		for y, top := range e.rows.low {
			bottom, down := e.rows.high[y], e.rows.portion[y]
			for x, left := range e.columns.low {
				right, across := e.columns.high[x], e.columns.portion[x]
				upper := (1-across)*at(top, left) + across*at(top, right)
				lower := (1-across)*at(bottom, left) + across*at(bottom, right)
				dst[i] = float32(e.low + e.scale*((1-down)*upper+down*lower+1))
				i++
			}
		}
	}
}

// probabilities returns the probability of each class: the softmax over all logits, summed over the class's outputs.
func probabilities(logits []float32, outputs []int, classes int) []float64 {
	most := slices.Max(logits)
	p, sum := make([]float64, classes), 0.0
	for i, logit := range logits {
		v := math.Exp(float64(logit) - float64(most))
		sum += v
		if outputs[i] >= 0 {
			p[outputs[i]] += v
		}
	}
	for i := range p {
		p[i] = min(1, p[i]/sum)
	}
	return p
}

// topClasses is how many classes a measurement by the judge names.
const topClasses = 3

// top returns the most likely of the classes that the judge has outputs for, most likely first.
func top(p []float64, outputs []int) []ClassProbability {
	told := make([]bool, len(p))
	for _, class := range outputs {
		if class >= 0 {
			told[class] = true
		}
	}
	list := make([]ClassProbability, 0, len(p))
	for class, probability := range p {
		if told[class] {
			list = append(list, ClassProbability{class, probability})
		}
	}
	slices.SortStableFunc(list, func(a, b ClassProbability) int { return cmp.Compare(b.Probability, a.Probability) })
	return slices.Clip(list[:min(topClasses, len(list))])
}

// finite reports whether all values are finite: a sum of float32 numbers cannot overflow float64.
func finite(values []float32) bool {
	sum := 0.0
	for _, v := range values {
		sum += float64(v)
	}
	return !math.IsNaN(sum) && !math.IsInf(sum, 0)
}

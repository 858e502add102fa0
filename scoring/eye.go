package scoring

import (
	"cmp"
	"math"
	"slices"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

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
	list := make([]ClassProbability, 0, len(p))
	for class, probability := range p {
		if slices.Contains(outputs, class) {
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

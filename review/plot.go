package review

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/decuwatch/decuwatch/schema"
)

// plot is a drawing in a box of Width x Height units, whose coordinates a template writes into SVG.
type plot struct {
	Width, Height float64
	Left, Right   float64 // of the axis
	Base          float64 // y of the axis
	Title         string  // for those who do not see it
	Bars          []bar   // of the class
	Shadow        string  // outline of all classes together, the points of a polyline; empty if there is none
	Lines         []mark
	Ticks         []mark
	Path          string // points of a polyline, of a trajectory
	Dots          []mark
	Empty         bool
}

type bar struct{ X, Y, W, H float64 }

// mark is a line, a dot or a tick with its text.
type mark struct {
	X, Y   float64
	Text   string
	Class  string // of CSS
	Anchor string // start, middle or end
}

// axis maps values to coordinates, by their logarithm if they spread far.
type axis struct {
	low, high  float64
	from, to   float64
	logarithms bool
}

// newAxis returns an axis over the values; they must be finite and not empty.
func newAxis(values []float64, from, to float64) axis {
	a := axis{low: slices.Min(values), high: slices.Max(values), from: from, to: to}
	a.logarithms = a.low > 0 && a.high/a.low > 8
	if a.logarithms {
		a.low, a.high = math.Log(a.low), math.Log(a.high)
	}
	pad := (a.high - a.low) * 0.04
	if pad == 0 {
		pad = max(math.Abs(a.low)*0.1, 1e-6)
	}
	if !a.logarithms && a.low >= 0 && a.low-pad < 0 {
		pad = min(pad, max(a.low, pad/4))
	}
	a.low, a.high = a.low-pad, a.high+pad
	return a
}

// at returns the coordinate of a value, within the axis.
func (a axis) at(v float64) float64 {
	if a.logarithms {
		v = math.Log(max(v, math.SmallestNonzeroFloat64))
	}
	f := (v - a.low) / (a.high - a.low)
	return a.from + min(max(f, 0), 1)*(a.to-a.from)
}

// ticks returns about n round values.
func (a axis) ticks(n int) []float64 {
	var list []float64
	if a.logarithms {
		low, high := math.Exp(a.low), math.Exp(a.high)
		steps := []float64{1, 2, 5}
		if high/low > 200 {
			steps = []float64{1}
		}
		for e := math.Floor(math.Log10(low)); e <= math.Ceil(math.Log10(high)); e++ {
			for _, m := range steps {
				if v := m * math.Pow(10, e); v >= low && v <= high {
					list = append(list, v)
				}
			}
		}
		return list
	}
	raw := (a.high - a.low) / float64(n)
	unit := math.Pow(10, math.Floor(math.Log10(raw)))
	step := unit * 10
	for _, m := range []float64{1, 2, 5} {
		if unit*m >= raw {
			step = unit * m
			break
		}
	}
	for v := math.Ceil(a.low/step) * step; v <= a.high; v += step {
		list = append(list, v)
	}
	return list
}

// number returns a value with three significant digits.
func number(v float64) string {
	if v != 0 && (math.Abs(v) < 1e-4 || math.Abs(v) >= 1e6) {
		return strconv.FormatFloat(v, 'g', 3, 64)
	}
	s := strconv.FormatFloat(v, 'f', max(0, 2-int(math.Floor(math.Log10(max(math.Abs(v), 1e-300))))), 64)
	if v == 0 {
		s = "0"
	}
	return s
}

// bound is a threshold in a plot.
type bound struct {
	Value      float64 // its place on the axis
	Compared   float64 // the number that decides: Value, or a mean distance
	ByDistance bool    // Compared is a mean distance, because the score is saturated
	Severity   schema.Severity
	Scope      schema.Scope
}

// text returns what stands at the bound's line.
func (b bound) text() string {
	if b.ByDistance {
		return string(b.Severity) + " at mean distance " + number(b.Compared)
	}
	return string(b.Severity) + " " + number(b.Compared)
}

// distribution draws a score among the scores of its class: a histogram of the class's, the outline of all
// classes', the thresholds and the score itself. The heights of the two are each to their own scale.
func distribution(class, all []float64, score float64, bounds []bound, label string) plot {
	p := plot{Width: 640, Height: 210, Left: 12, Right: 628, Base: 168}
	p.Title = fmt.Sprintf("Scores of %s: %d. This score is %s.", label, len(class), number(score))
	p.Empty = len(class) < 2
	values := append(slices.Concat(class, all), score)
	for _, b := range bounds {
		values = append(values, b.Value)
	}
	a := newAxis(values, p.Left, p.Right)
	const bins, top = 56, 46.0
	count := func(values []float64) (counts [bins]float64, most float64) {
		for _, v := range values {
			i := min(int((a.at(v)-p.Left)/(p.Right-p.Left)*bins), bins-1)
			counts[i]++
			most = max(most, counts[i])
		}
		return counts, most
	}
	width := (p.Right - p.Left) / bins
	counts, most := count(class)
	for i, n := range counts {
		if n > 0 {
			h := max(2, n/most*(p.Base-top))
			p.Bars = append(p.Bars, bar{round(p.Left + float64(i)*width + 0.5), round(p.Base - h), round(width - 1), round(h)})
		}
	}
	if counts, most := count(all); most > 0 {
		for i, n := range counts {
			y := p.Base - n/most*(p.Base-top)
			p.Shadow += fmt.Sprintf("%.1f,%.1f %.1f,%.1f ", p.Left+float64(i)*width, y, p.Left+float64(i+1)*width, y)
		}
	}
	for _, v := range a.ticks(6) {
		p.Ticks = append(p.Ticks, mark{X: round(a.at(v)), Y: p.Base, Text: number(v), Anchor: anchor(a.at(v), number(v), p)})
	}
	for _, b := range bounds {
		p.Lines = append(p.Lines, mark{X: round(a.at(b.Value)), Y: 30, Text: b.text(), Class: "bound " + string(b.Severity),
			Anchor: anchor(a.at(b.Value), b.text(), p)})
	}
	slices.SortFunc(p.Lines, func(a, b mark) int { return int(a.X - b.X) })
	for i := 1; i < len(p.Lines); i++ { // texts that would meet stand one above the other
		if p.Lines[i].X-p.Lines[i-1].X < 160 {
			p.Lines[i].Y = 76 - p.Lines[i-1].Y
		}
	}
	text := "this score " + number(score)
	p.Lines = append(p.Lines, mark{X: round(a.at(score)), Y: 14, Text: text, Class: "score",
		Anchor: anchor(a.at(score), text, p)})
	return p
}

// anchor returns on which side of x a text fits. Texts are largest on a phone.
func anchor(x float64, text string, p plot) string {
	const character = 11 // width on a phone, in the plot's units
	half := character * float64(utf8.RuneCountInString(text)) / 2
	switch {
	case x < p.Left+half:
		return "start"
	case x > p.Right-half:
		return "end"
	}
	return "middle"
}

// trajectory draws the disagreement of the components by the step at which they leave the shared path.
func trajectory(dots []TrajectoryDot) plot {
	p := plot{Width: 640, Height: 170, Left: 106, Right: 628, Base: 138}
	if len(dots) == 0 {
		p.Empty = true
		return p
	}
	var values []float64
	for _, d := range dots {
		values = append(values, d.MeanDistance)
	}
	y := newAxis(values, p.Base, 14)
	last := float64(max(1, dots[len(dots)-1].Step))
	for _, d := range dots {
		x := p.Left + 6 + float64(d.Step)/last*(p.Right-p.Left-12)
		p.Path += fmt.Sprintf("%.1f,%.1f ", x, y.at(d.MeanDistance))
		p.Dots = append(p.Dots, mark{X: round(x), Y: round(y.at(d.MeanDistance)),
			Text: fmt.Sprintf("step %d: mean distance %s, PaiDE %s nats", d.Step, number(d.MeanDistance), number(d.Value))})
		p.Ticks = append(p.Ticks, mark{X: round(x), Y: p.Base, Text: strconv.Itoa(d.Step), Anchor: "middle"})
	}
	ticks := y.ticks(4)
	every := (len(ticks) + 4) / 5
	for i, v := range ticks {
		if i%every != 0 {
			continue
		}
		p.Lines = append(p.Lines, mark{X: p.Left - 6, Y: round(y.at(v)), Text: number(v)})
	}
	p.Title = fmt.Sprintf("Mean pairwise distance by branch step, from %s at step 0 to %s at step %d", number(values[0]),
		number(values[len(values)-1]), dots[len(dots)-1].Step)
	return p
}

func round(v float64) float64 { return math.Round(v*10) / 10 }

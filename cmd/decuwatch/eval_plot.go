package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"gonum.org/v1/gonum/stat"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// write writes results.json, results.md and the plots.
func (r *evalResults) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // results are no secret
		return err
	}
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.json"), append(content, '\n'), 0o644); err != nil { //nolint:gosec // results are no secret
		return err
	}
	var text bytes.Buffer
	if err := r.print(&text, markdownTable); err != nil {
		return err
	}
	for i, score := range r.Scores {
		name := fmt.Sprintf("scores-by-bin-%d.png", i+1)
		if err := r.drawDensities(score, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(&text, "\n![%s: densities by bin](%s)\n", score.Settings, name)
	}
	const frontier = "quality-against-rows.png"
	if err := r.drawFrontier(filepath.Join(dir, frontier)); err != nil {
		return fmt.Errorf("%s: %w", frontier, err)
	}
	fmt.Fprintf(&text, "\n![quality against rows](%s)\n", frontier)
	return os.WriteFile(filepath.Join(dir, "results.md"), text.Bytes(), 0o644) //nolint:gosec // results are no secret
}

// drawDensities draws a Gaussian kernel density of log10 of the score for each bin, with Silverman's bandwidth.
func (r *evalResults) drawDensities(score evalScore, file string) error {
	p := plot.New()
	p.Title.Text = fmt.Sprintf("%s, %d rows", score.Settings, score.Rows)
	p.X.Label.Text, p.Y.Label.Text = "log10 of the score", "density"
	p.Legend.Top, p.Legend.Left = true, true
	for i, bin := range r.Bins {
		var values []float64
		for k, c := range r.cells {
			for _, v := range score.values[k] {
				if c.Bin == bin && v > 0 {
					values = append(values, math.Log10(v))
				}
			}
		}
		if len(values) < 2 {
			continue
		}
		line, err := plotter.NewLine(density(values))
		if err != nil {
			return err
		}
		line.Color, line.Width = plotutil.Color(i), vg.Points(1.5)
		p.Add(line)
		p.Legend.Add(fmt.Sprintf("%g images", bin), line)
	}
	return p.Save(16*vg.Centimeter, 10*vg.Centimeter, file)
}

// density returns 200 points of a Gaussian kernel density with Silverman's bandwidth.
func density(values []float64) plotter.XYs {
	width := max(1e-3, 1.06*stat.StdDev(values, nil)*math.Pow(float64(len(values)), -0.2))
	low, high := values[0], values[0]
	for _, v := range values {
		low, high = min(low, v-3*width), max(high, v+3*width)
	}
	points := make(plotter.XYs, 200)
	for i := range points {
		x := low + (high-low)*float64(i)/float64(len(points)-1)
		points[i].X = x
		for _, v := range values {
			points[i].Y += math.Exp(-0.5*math.Pow((x-v)/width, 2)) / (width * math.Sqrt(2*math.Pi) * float64(len(values)))
		}
	}
	return points
}

// drawFrontier draws the quality of every score against its rows: the lowest AUROC of the bins, and the rank correlation
// with the error within class and bin.
func (r *evalResults) drawFrontier(file string) error {
	p := plot.New()
	p.X.Label.Text, p.Y.Label.Text = "rows of U-Net work", "quality"
	p.Y.Min, p.Y.Max = 0, 1.25 // room for the legend
	p.Legend.Top = true
	var classes, requests plotter.XYs
	for _, score := range r.Scores {
		if v := score.ClassLevel.Hardest(); !math.IsNaN(v) {
			classes = append(classes, plotter.XY{X: float64(score.Rows), Y: v})
		}
		if score.RequestLevel != nil && score.RequestLevel.Within != nil {
			requests = append(requests, plotter.XY{X: float64(score.Rows), Y: score.RequestLevel.Within.Value})
		}
	}
	for i, series := range []struct {
		name   string
		points plotter.XYs
	}{{"AUROC of the hardest bin", classes}, {"Spearman with the error within class and bin", requests}} {
		if len(series.points) == 0 {
			continue
		}
		scatter, err := plotter.NewScatter(series.points)
		if err != nil {
			return err
		}
		scatter.Color, scatter.Shape, scatter.Radius = plotutil.Color(i), plotutil.Shape(i), vg.Points(4)
		p.Add(scatter)
		p.Legend.Add(series.name, scatter)
	}
	p.Add(plotter.NewGrid())
	return p.Save(16*vg.Centimeter, 10*vg.Centimeter, file)
}

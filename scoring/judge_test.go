package scoring

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// The judge's input is what torch.nn.functional.interpolate (align_corners=False) makes of the clipped image.
func TestResize(t *testing.T) {
	image := []float32{-1.5, 0.25, 0.75, -0.5, 2} // clipped to -1 and 1
	for _, want := range [][]float64{
		{0.75},
		{-0.0625, -0.125},
		{-0.583333, 0.75, 0.5},
		{-1, 0.25, 0.75, -0.5, 1},
		{-1, -0.453125, 0.28125, 0.59375, 0.359375, -0.421875, 0.34375, 1},
		{-1, -0.84375, -0.322917, 0.197917, 0.4375, 0.645833, 0.489583, -0.03125, -0.4375, 0.1875, 0.8125, 1},
	} {
		wide := newEye(ensemble.Image{Channels: 1, Height: 1, Width: 5},
			&ensemble.Judge{Channels: 1, Height: 1, Width: len(want), Range: [2]float64{-1, 1}})
		high := newEye(ensemble.Image{Channels: 1, Height: 5, Width: 1},
			&ensemble.Judge{Channels: 1, Height: len(want), Width: 1, Range: [2]float64{0, 10}})
		row, column := make([]float32, wide.size()), make([]float32, high.size())
		wide.look(row, image)
		high.look(column, image)
		for i, v := range want {
			if math.Abs(float64(row[i])-v) > 1e-6 || math.Abs(float64(column[i])-5*(v+1)) > 1e-5 {
				t.Errorf("%d pixels: pixel %d is %v in a row and %v of 10 in a column, want %v", len(want), i, row[i], column[i], v)
			}
		}
	}
}

// A softmax over all logits, however large, summed over the outputs of each class.
func TestProbabilities(t *testing.T) {
	p := probabilities([]float32{1000, 1000, 1000, 1000, -1000}, []int{2, 0, -1, 2, 3}, 4)
	if !slices.Equal(p, []float64{0.25, 0, 0.5, 0}) {
		t.Errorf("probabilities %v", p)
	}
	list := top(p, []int{2, 0, -1, 2, 3})
	if !slices.Equal(list, []ClassProbability{{2, 0.5}, {0, 0.25}, {3, 0}}) {
		t.Errorf("top %v: class 1 has no output", list)
	}
}

// A judge apart from an ensemble says what the ensemble's own says of the same images.
func TestOpenJudge(t *testing.T) {
	e := open(t, tiny2, Options{Threads: 1})
	graph, err := os.ReadFile(filepath.Join(tiny2, "judge.onnx"))
	if err != nil {
		t.Fatal(err)
	}
	j, err := OpenJudge(e.ensemble.Judge, graph, &e.ensemble.Manifest, Options{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	}()
	var latents, images [][]float32
	for seed := range uint64(imageRows + 3) {
		latents = append(latents, firstLatent(t, e, Request{Seed: seed}))
	}
	pictures, err := e.Pictures(t.Context(), latents)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pictures {
		images = append(images, p.Image)
	}
	have, err := j.Probabilities(images)
	if err != nil || len(have) != len(images) {
		t.Fatalf("%d of %d, %v", len(have), len(images), err)
	}
	for i, p := range pictures {
		for class, want := range p.Probabilities {
			if !Agrees(have[i][class], want) {
				t.Errorf("image %d: class %d has probability %v, the ensemble says %v", i, class, have[i][class], want)
			}
		}
	}
	images[0] = slices.Repeat([]float32{float32(math.NaN())}, len(images[0]))
	if _, err := j.Probabilities(images); err == nil {
		t.Error("an image that is not finite is judged")
	}
}

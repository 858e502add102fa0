package scoring

import (
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/paide"
)

func TestEvidence(t *testing.T) {
	for _, dir := range []string{shipped, tinyTokens} {
		e := open(t, dir, Options{})
		r := Request{Key: "evidence\n1", Class: 1, Seed: 7}
		evidence, err := e.Evidence(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		score, err := e.Score(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		// The same request, in other runs: the score is the same within the tolerance, the receipt exactly.
		for _, pair := range [][2]Measurement{{evidence.Result.ClassGap, score.ClassGap},
			{*evidence.Result.RequestRisk, *score.RequestRisk}} {
			if !Agrees(pair[0].Value, pair[1].Value) {
				t.Errorf("evidence has %v, the score %v", pair[0].Value, pair[1].Value)
			}
		}
		if evidence.Result.Receipt.Rows != score.Receipt.Rows || evidence.Result.Receipt.Carrier != score.Receipt.Carrier {
			t.Errorf("receipts differ: %+v, %+v", evidence.Result.Receipt, score.Receipt)
		}
		m := e.ensemble
		if len(evidence.Images) != m.Components || len(evidence.LatentMap) != m.Latent.Height*m.Latent.Width ||
			len(evidence.ImageMap) != m.Image.Height*m.Image.Width {
			t.Errorf("%d images, maps of %d and %d", len(evidence.Images), len(evidence.LatentMap), len(evidence.ImageMap))
		}
		bound := paide.UpperBound(m.Components)
		for _, v := range append(evidence.LatentMap, evidence.ImageMap...) {
			if !(v >= 0 && v <= bound) {
				t.Fatalf("map holds %v, must be 0 to %v", v, bound)
			}
		}
		for _, image := range evidence.Images {
			for _, v := range image {
				if !(v > -3 && v < 3) {
					t.Fatalf("pixel is %v", v)
				}
			}
		}
		steps := e.evidenceProfile(e.fixed).RequestRisk.Steps
		last := evidence.Trajectory[len(evidence.Trajectory)-1]
		if len(evidence.Trajectory) != min(trajectoryPoints, steps) || evidence.Trajectory[0].BranchStep != 0 ||
			last.BranchStep != steps-1 {
			t.Errorf("trajectory has %d points from %d to %d", len(evidence.Trajectory), evidence.Trajectory[0].BranchStep,
				last.BranchStep)
		}
		if evidence.Final.RolloutSteps != steps || !(evidence.Diversity >= 0 && evidence.Diversity <= 2) {
			t.Errorf("final %+v, diversity %v", evidence.Final, evidence.Diversity)
		}
		if _, err := e.Evidence(t.Context(), Request{Class: -1}); !errors.Is(err, ErrUnknownClass) {
			t.Errorf("unknown class: %v", err)
		}
	}
}

func TestSSIM(t *testing.T) {
	shape := ensemble.Image{Channels: 3, Height: 16, Width: 20}
	r := rand.New(rand.NewPCG(1, 2))
	a, noise := make([]float32, shape.Size()), make([]float32, shape.Size())
	for i := range a {
		a[i] = float32(math.Sin(float64(i) / 7))
		noise[i] = float32(r.NormFloat64())
	}
	if v := ssim(a, a, shape); math.Abs(v-1) > 1e-12 {
		t.Errorf("an image with itself: %v, want 1", v)
	}
	// The farther the noise, the lower the similarity.
	previous := 1.0
	for _, scale := range []float32{0.05, 0.2, 0.8} {
		b := make([]float32, len(a))
		for i := range b {
			b[i] = a[i] + scale*noise[i]
		}
		v := ssim(a, b, shape)
		if v >= previous || ssim(b, a, shape) != v {
			t.Errorf("noise %v: %v after %v", scale, v, previous)
		}
		previous = v
	}
	// Two flat images leave the luminance term alone: (2ab + C1) / (a^2 + b^2 + C1), C1 = 0.0004.
	flat := ensemble.Image{Channels: 1, Height: 5, Width: 4}
	dark, light := make([]float32, flat.Size()), make([]float32, flat.Size())
	for i := range dark {
		dark[i], light[i] = 0.25, 0.5
	}
	if have, want := ssim(dark, light, flat), (2*0.125+0.0004)/(0.0625+0.25+0.0004); math.Abs(have-want) > 1e-12 {
		t.Errorf("flat images: %v, want %v", have, want)
	}
}

package scoring

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/paide"
)

// Evidence is what a reviewer looks at: the images that each component alone generates for the request, how they
// differ, and how the disagreement develops along the sampler.
type Evidence struct {
	Result Result // the score, computed in the same run

	// Images are the components' own images, rolled out from the first latent: [M][channels*height*width], in [-1, 1]
	// up to the decoder's overshoot. The score followed the path of the receipt's carrier.
	Images [][]float32
	// LatentMap is PaiDE of each position of the final latents, [height*width] of the latent, in nats, at most ln M.
	LatentMap []float64
	// ImageMap is PaiDE of each pixel of the images, [height*width] of the image, in nats, at most ln M.
	ImageMap []float64
	// Trajectory holds measurements of a single step (paide-w2 with its mean distance) at up to 11 branch steps, evenly
	// spaced and ascending. The noisy early steps show the class, later ones the request.
	Trajectory []Measurement
	// Final measures the distance between the components' final latents (mean-w2 from branch step 0).
	Final Measurement
	// Similarity is the structural similarity of each pair of images, M x M, 1 on the diagonal.
	Similarity [][]float64
	// Diversity is 1 minus the mean similarity of different components' images: 0 if all images are alike.
	Diversity float64
}

// trajectoryPoints is how many branch steps Evidence measures at most.
const trajectoryPoints = 11

// evidenceMeasures are the profile's two measurements, the roll-out of all components from the first latent, and the
// points of the trajectory.
func evidenceMeasures(p Profile, d Diffusion) []Measure {
	whole := wholeRollout(d, p.RequestRisk.Steps)
	measures, steps := []Measure{p.ClassGap, p.RequestRisk, whole}, whole.RolloutSteps
	points := min(trajectoryPoints, steps)
	for i := range points {
		step := 0
		if points > 1 {
			step = int(math.Round(float64(i) * float64(steps-1) / float64(points-1)))
		}
		point := whole
		point.BranchStep, point.RolloutSteps, point.Estimator = step, 1, ensemble.PaiDEW2
		measures = append(measures, point)
	}
	return measures
}

// Evidence gathers the evidence of a request with background priority. It costs several times the rows of a score.
// Errors are the same as for Score.
func (e *Engine) Evidence(ctx context.Context, r Request) (Evidence, error) {
	profile := e.profile(r)
	measures := evidenceMeasures(profile, e.ensemble.Diffusion)
	p, err := e.compile(e.ensemble.Components, profile, measures...)
	if err != nil {
		return Evidence{}, err
	}
	r.Priority = Background
	t, receipt, err := e.run(ctx, r, p, profile)
	if err != nil {
		return Evidence{}, err
	}
	defer e.sampler.release(t)
	if scored, err := e.plan(profile); err == nil {
		receipt.Rows = scored.rows // of the score that the receipt belongs to
	}
	latent, image := e.ensemble.Latent, e.ensemble.Image
	measured := make([]Measurement, len(p.measures))
	for i, m := range p.measures {
		measured[i] = p.measure(m, t.means[i], latent)
	}
	images, err := e.decode(ctx, t.means[2], len(p.steps))
	if err != nil {
		return Evidence{}, err
	}
	evidence := Evidence{
		Result:     Result{ClassGap: measured[0], RequestRisk: measured[1], ImageRiskReason: ReasonNoJudge, Receipt: receipt},
		Images:     images,
		LatentMap:  paide.Map(t.means[2], latent.Channels, latent.Height*latent.Width),
		ImageMap:   paide.Map(images, image.Channels, image.Height*image.Width),
		Trajectory: measured[3:],
		Final:      measured[2],
	}
	evidence.Similarity, evidence.Diversity = similarities(images, image)
	return evidence, nil
}

// decode returns the images of latents, one after another in runs of the decoder.
func (e *Engine) decode(ctx context.Context, latents [][]float32, step int) ([][]float32, error) {
	if err := e.takeDecoder(ctx); err != nil {
		return nil, err
	}
	left := false // the decoder was left to a run that did not return
	defer func() {
		if !left {
			<-e.decoding
		}
	}()
	if e.sessions == nil {
		return nil, ErrClosed
	}
	n, size := e.ensemble.Latent.Size(), e.ensemble.Image.Size()
	scale, shift := e.ensemble.Latent.Scale, e.ensemble.Latent.Shift
	images := make([][]float32, len(latents))
	for at := 0; at < len(latents); at += decoderRows {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		rows := min(decoderRows, len(latents)-at)
		for i, latent := range latents[at : at+rows] {
			for j, v := range latent {
				e.decoder.Input(0)[i*n+j] = float32(float64(v)/scale + shift)
			}
		}
		padded := rows
		if len(e.options.Buckets) > 0 {
			padded = decoderRows // the one warmed shape
		}
		var err error
		if left, err = e.runDecoder(ctx, padded); err != nil {
			return nil, fmt.Errorf("decode: %w", err)
		}
		for i := range rows {
			pixels := append([]float32(nil), e.decoder.Output()[i*size:(i+1)*size]...)
			sum := 0.0
			for _, v := range pixels {
				sum += float64(v)
			}
			if math.IsNaN(sum) || math.IsInf(sum, 0) {
				return nil, fmt.Errorf("decode: %w", &NonFiniteError{Step: step, Component: at + i})
			}
			images[at+i] = pixels
		}
	}
	return images, nil
}

// takeDecoder waits for the decoder, which one caller uses at a time.
func (e *Engine) takeDecoder(ctx context.Context) error {
	select {
	case e.decoding <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// runDecoder runs the decoder. If ctx ends first, it returns at once and leaves the decoder to the run in progress,
// which gives it back when it returns.
func (e *Engine) runDecoder(ctx context.Context, rows int) (left bool, err error) {
	ended := make(chan error, 1)
	go func() { ended <- e.decoder.Run(rows) }()
	select {
	case err := <-ended:
		return false, err
	case <-ctx.Done():
		go func() {
			<-ended //nolint:errcheck // the caller has its answer
			<-e.decoding
		}()
		return true, errors.Join(ctx.Err(), e.decoder.Terminate())
	}
}

package scoring

import (
	"context"
	"math"
	"slices"

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
	// Producer is the image of the producer's table; nil if the ensemble has no such table.
	Producer *ProducerImage
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

// ProducerImage is an image of the table that stands for the production model.
type ProducerImage struct {
	Image []float32          // as Evidence.Images
	Top   []ClassProbability // the judge's three most likely classes, most likely first; nil without a judge
}

// trajectoryPoints is how many branch steps Evidence measures at most.
const trajectoryPoints = 11

// evidenceSteps is how many steps the images of Evidence take at least: fewer blur them.
const evidenceSteps = 20

// evidenceProfile returns the profile whose steps the images take. Scores of format 1 are made of such images.
func (e *Engine) evidenceProfile(p Profile) Profile {
	if p.Start > 0 {
		return p // the latent stands at a step of this sampler
	}
	steps := max(p.ClassGap.Steps, p.RequestRisk.Steps, p.ImageRisk.Steps)
	if e.ensemble.Format != ensemble.Format1 {
		steps = max(steps, evidenceSteps)
	}
	images := p.WithSampler(e.ensemble.Diffusion, steps, p.GuidanceScale, p.Eta)
	if images.Validate(&e.ensemble.Manifest) != nil {
		return p // the sampler cannot take that many steps
	}
	return images
}

// evidenceMeasures are the roll-out of all members from the first latent, the points of the trajectory, and the
// roll-out of the producer if the ensemble has one.
func (e *Engine) evidenceMeasures(p Profile) (whole Measure, points []Measure, producer []Measure) {
	d, steps := e.ensemble.Diffusion, e.evidenceProfile(p).RequestRisk.Steps
	whole = rolloutFrom(p.Start, wholeRollout(d, ensemble.TablesMembers, steps))
	taken := whole.RolloutSteps
	n := min(trajectoryPoints, taken)
	for i := range n {
		point := whole
		point.RolloutSteps, point.Estimator = 1, ensemble.PaiDEW2
		if n > 1 {
			point.BranchStep += int(math.Round(float64(i) * float64(taken-1) / float64(n-1)))
		}
		points = append(points, point)
	}
	if e.ensemble.Tables(ensemble.TablesProducer) != nil {
		producer = []Measure{rolloutFrom(p.Start, wholeRollout(d, ensemble.TablesProducer, steps))}
	}
	return whole, points, producer
}

// Evidence gathers the evidence of a request with background priority. It costs several times the rows of a score.
// Errors are the same as for Score.
func (e *Engine) Evidence(ctx context.Context, r Request) (Evidence, error) {
	r.Priority = Background
	scored, reason, err := e.work(r)
	if err != nil {
		return Evidence{}, err
	}
	profile := e.profile(r)
	whole, points, producer := e.evidenceMeasures(profile)
	p, err := e.compile(profile, slices.Concat(scored.measures, []Measure{whole}, points, producer))
	if err != nil {
		return Evidence{}, err
	}
	t, receipt, err := e.run(ctx, r, p)
	if err != nil {
		return Evidence{}, err
	}
	defer e.sampler.release(t)
	receipt.Rows = scored.rows // of the score that the receipt belongs to
	result, err := e.result(ctx, r, t, reason)
	if err != nil {
		return Evidence{}, err
	}
	result.Receipt = receipt
	means := t.means[len(scored.measures):]
	evidence, err := e.members(ctx, means[0])
	if err != nil {
		return Evidence{}, err
	}
	evidence.Result, evidence.Final = result, p.measure(whole, means[0], e.ensemble.Latent)
	for i, m := range points {
		evidence.Trajectory = append(evidence.Trajectory, p.measure(m, means[1+i], e.ensemble.Latent))
	}
	if len(producer) > 0 {
		evidence.Producer, err = e.producer(ctx, means[1+len(points)])
	}
	return evidence, err
}

// members returns the images of the members' final latents, and how they differ.
func (e *Engine) members(ctx context.Context, latents [][]float32) (Evidence, error) {
	latent, image := e.ensemble.Latent, e.ensemble.Image
	pictures, err := e.imager.run(ctx, latents, false, Background)
	if err != nil {
		return Evidence{}, err
	}
	var evidence Evidence
	for _, p := range pictures {
		evidence.Images = append(evidence.Images, p.Image)
	}
	evidence.LatentMap = paide.Map(latents, latent.Channels, latent.Height*latent.Width)
	evidence.ImageMap = paide.Map(evidence.Images, image.Channels, image.Height*image.Width)
	evidence.Similarity, evidence.Diversity = similarities(evidence.Images, image)
	return evidence, nil
}

// producer returns the image of the producer's final latent, and what the judge says of it.
func (e *Engine) producer(ctx context.Context, latents [][]float32) (*ProducerImage, error) {
	pictures, err := e.imager.run(ctx, latents, true, Background)
	if err != nil {
		return nil, err
	}
	out := &ProducerImage{Image: pictures[0].Image}
	if e.ensemble.Judge != nil {
		out.Top = top(pictures[0].Probabilities, e.ensemble.Judge.Outputs)
	}
	return out, nil
}

// ClassImages returns n images that the backbone's own, fully trained table makes of a class, with background priority:
// what the class looks like if it is understood. Their first latents are drawn from the seeds 0 to n-1, so they are the
// same each time. It returns no image if the ensemble has no such table.
func (e *Engine) ClassImages(ctx context.Context, class, n int) ([][]float32, error) {
	if e.ensemble.Tables(ensemble.TablesReference) == nil {
		return nil, nil
	}
	var latents [][]float32
	for seed := range n {
		r := Request{Class: class, Seed: uint64(seed), Profile: e.evidenceProfile(e.fixed), Priority: Background}
		rollout, err := e.Rollout(ctx, r, ensemble.TablesReference)
		if err != nil {
			return nil, err
		}
		latents = append(latents, rollout.Latents[ensemble.TablesReference]...)
	}
	pictures, err := e.imager.run(ctx, latents, false, Background)
	if err != nil {
		return nil, err
	}
	images := make([][]float32, len(pictures))
	for i, p := range pictures {
		images[i] = p.Image
	}
	return images, nil
}

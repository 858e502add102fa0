package monitor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/decuwatch/decuwatch/monitor/sampling"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
	"github.com/decuwatch/decuwatch/scoring/diffusion"
)

// Model is the ensemble of a production model, and how its events are scored.
type Model struct {
	Scorer  Scorer
	Classes []string        // labels in index order
	Images  []int           // training images of each class
	Profile scoring.Profile // the fixed profile
	// Diffusion is the ensemble's diffusion. It says how many steps the sampler of an event takes.
	Diffusion scoring.Diffusion
	// Latent is the shape of the ensemble's latents. Latents reads those that events name; nil reads none.
	Latent  scoring.LatentShape
	Latents Latents
	// AsRequested scores each event with its own sampler settings instead of the fixed profile's. Thresholds belong to
	// settings, so each combination needs its own.
	AsRequested bool
	// Cascade spares the request risk of events whose class gap is low; the zero value spares none.
	Cascade scoring.Cascade
	// SkipUnreproducible skips an event that cannot be rerun as its producer ran it. Otherwise it is scored, and the
	// receipt says what was replaced.
	SkipUnreproducible bool
}

// plan is how an event comes to its verdict: its request is scored, or it is skipped, or it cannot be scored.
type plan struct {
	model      Model
	event      schema.Event
	request    scoring.Request
	class      int      // -1 if the model does not have it
	deviations []string // from the event, in the request
	skip       *schema.Skip
	err        error // why the event cannot be scored; retrying will not help

	probability float64 // with which the event was selected; 0 means 1
	paid        int     // rows that were taken from the budget
}

// plan decides how ev comes to its verdict, without running anything.
func (m Model) plan(ev schema.Event) plan {
	p := plan{model: m, event: ev, class: -1}
	class, err := m.class(ev.Data.Class)
	if err != nil {
		p.err = err
		return p
	}
	p.class = class
	p.request = scoring.Request{Key: Key(ev.Source, ev.ID), Class: class, Seed: ev.Data.Seed}
	p.planSampler()
	if ev.Data.Latent != nil {
		p.planLatent()
	} else {
		p.planNoise()
	}
	p.planCascade()
	return p
}

// planLatent takes the event's own latent. If that is impossible, the event is skipped, whatever the model says:
// nothing else stands for what the producer ran.
func (p *plan) planLatent() {
	m, l := p.model, *p.event.Data.Latent
	shape := []int{m.Latent.Channels, m.Latent.Height, m.Latent.Width}
	switch bucket := schema.LatentBucket(p.event.Data.Model); {
	case m.Latents == nil:
		p.skipLatent("latents of events are not read here")
	case l.Bucket != bucket:
		p.skipLatent("bucket is %s, latents of this model are read from %s", l.Bucket, bucket)
	case !slices.Equal(l.Shape, shape):
		p.skipLatent("shape is %v, the ensemble's latents have %v", l.Shape, shape)
	}
	p.request.Latent = &scoring.Latent{SHA256: l.SHA256, Step: l.Step}
	if l.Timestep != nil {
		p.planStep(p.event.Data.Sampler, l)
	}
	if profile := cmp.Or(p.request.Profile, m.Profile); profile.Eta > 0 {
		p.planNoise()
	}
}

// planStep lets the rerun continue where the producer's sampler stood. Only the event's own sampler has that step. A
// first latent stands at the first timestep.
func (p *plan) planStep(s *schema.Sampler, l schema.Latent) {
	m := p.model
	if s == nil {
		p.skipLatent("timestep is given without a sampler")
		return
	}
	if !slices.Contains(m.Diffusion.SamplerNames(), strings.ToLower(s.Name)) {
		p.skipLatent("step %d is of the sampler %s, %s reruns requests", l.Step, s.Name, m.Diffusion.Sampler())
		return
	}
	steps, err := diffusion.Steps(m.Diffusion, s.Steps, s.Eta)
	switch {
	case err != nil:
		p.skipLatent("%s", err)
	case l.Step >= len(steps):
		p.skipLatent("step is %d, the sampler takes %d", l.Step, len(steps))
	case math.Abs(steps[l.Step].Timestep-*l.Timestep) > timestepTolerance:
		p.skipLatent("timestep is %v at step %d, the ensemble's sampler has %g there", *l.Timestep, l.Step,
			steps[l.Step].Timestep)
	case l.Step > 0:
		p.request.Profile = m.Profile.WithSampler(m.Diffusion, s.Steps, s.GuidanceScale, s.Eta).From(m.Diffusion, l.Step)
		if err := m.Scorer.Validate(p.request); err != nil {
			p.skipLatent("%s", err)
		}
	}
}

// timestepTolerance is how far the timestep of an event may lie from the sampler's.
const timestepTolerance = 1e-2

// skipLatent skips the event because of its latent, with the first reason.
func (p *plan) skipLatent(format string, args ...any) {
	if p.skip == nil {
		p.skip = &schema.Skip{Event: p.event, Reason: schema.SkipLatent, Detail: "latent: " + fmt.Sprintf(format, args...)}
	}
}

// fetch reads the event's own latent. It returns a skip if there is none, or if it cannot be used.
func (p *plan) fetch(ctx context.Context, stored time.Time) (*schema.Skip, error) {
	if p.request.Latent == nil {
		return nil, nil
	}
	values, err := ReadLatent(ctx, p.model.Latents, *p.event.Data.Latent, stored)
	var broken *schema.LatentError
	switch {
	case errors.Is(err, schema.ErrLatentMissing) || errors.As(err, &broken):
		return &schema.Skip{Event: p.event, Reason: schema.SkipLatent, Detail: err.Error()}, nil
	case err != nil:
		return nil, err
	}
	own := *p.request.Latent
	own.Values = values
	p.request.Latent = &own
	return nil, nil
}

// ReadLatent returns the numbers of a latent that an event names. Errors are those of Latents; the object is checked
// against what the event says of it.
func ReadLatent(ctx context.Context, latents Latents, l schema.Latent, stored time.Time) ([]float32, error) {
	object, err := latents.Latent(ctx, l, stored)
	if err != nil {
		return nil, err
	}
	numbers, err := l.Numbers(object)
	if err != nil {
		return nil, err
	}
	values, err := scoring.LatentValues(numbers, l.Dtype)
	if err != nil {
		return nil, &schema.LatentError{Reason: err.Error()}
	}
	return values, nil
}

// planSampler takes the event's sampler settings if the model is scored as requested, else the fixed profile.
func (p *plan) planSampler() {
	m, s := p.model, p.event.Data.Sampler
	switch {
	case s != nil && !slices.Contains(m.Diffusion.SamplerNames(), strings.ToLower(s.Name)):
		p.deviate(schema.SkipSampler, "sampler: %s was replaced by %s", s.Name, m.Diffusion.Sampler())
	case m.AsRequested && s == nil:
		p.deviate(schema.SkipSampler, "sampler: not in the event, the fixed profile was used")
	case m.AsRequested:
		profile := m.Profile.WithSampler(m.Diffusion, s.Steps, s.GuidanceScale, s.Eta)
		if err := m.Scorer.Validate(scoring.Request{Class: p.request.Class, Profile: profile}); err != nil {
			p.deviate(schema.SkipSettings, "sampler settings: %s; the fixed profile was used", err)
			return
		}
		p.request.Profile = profile
	}
}

// planNoise takes the event's draw of the first latent as far as the scorer can repeat it.
func (p *plan) planNoise() {
	data := p.event.Data
	draw := scoring.Draw{Dtype: data.NoiseDtype, Offset: data.NoiseOffset}
	if data.GPU != nil {
		draw.GPU = scoring.GPU(*data.GPU)
	}
	if i := data.BatchIndex; i != nil && data.BatchSize == 0 {
		p.deviate(schema.SkipNoise, "noise: image %d of those drawn together cannot be drawn again without batch_size, "+
			"an image drawn alone was used", *i)
	} else if i != nil {
		draw.Batch = scoring.Batch{Index: *i, Size: data.BatchSize}
	}
	request := scoring.Request{Class: p.request.Class, Noise: data.Noise, Draw: draw}
	err := p.model.Scorer.Validate(request)
	if err == nil {
		p.request.Noise, p.request.Draw = request.Noise, request.Draw
		return
	}
	request.Draw = scoring.Draw{}
	if draw != request.Draw && p.model.Scorer.Validate(request) == nil {
		p.request.Noise = request.Noise
		p.deviate(schema.SkipNoise, "noise: %s; float32 drawn alone was used", err)
		return
	}
	if own := p.model.Scorer.Validate(scoring.Request{Class: p.request.Class}); own != nil && p.skip == nil {
		p.skip = &schema.Skip{Event: p.event, Reason: schema.SkipNoise,
			Detail: fmt.Sprintf("noise: %s; nor does the ensemble's own generator: %s", err, own)}
		return
	}
	p.deviate(schema.SkipNoise, "noise: %s; the ensemble's own generator was used", err)
}

// planCascade sets the cut of the request, unless the event is drawn to be measured whatever its class gap is. The cut
// is in the unit of a class gap from the first step, so it says nothing about a later latent.
func (p *plan) planCascade() {
	if c := p.model.Cascade; p.request.Profile.Start == 0 && !drawn(p.event, "cascade", c.Share) {
		p.request.Cut = c.Cut
	}
}

// deviate notes that the request does not follow the event. The first deviation is a skip if the model asks for that.
func (p *plan) deviate(reason schema.SkipReason, format string, args ...any) {
	deviation := fmt.Sprintf(format, args...)
	p.deviations = append(p.deviations, deviation)
	if p.model.SkipUnreproducible && p.skip == nil {
		p.skip = &schema.Skip{Event: p.event, Reason: reason, Detail: deviation}
	}
}

// rows returns the rows of backbone work that the plan costs, at least 1.
func (p *plan) rows() int {
	if p.err != nil || p.skip != nil {
		return 1
	}
	return max(p.model.Scorer.Rows(p.request), 1)
}

// score reruns the request.
func (p *plan) score(ctx context.Context) (scoring.Result, error) {
	result, err := p.model.Scorer.Score(ctx, p.request)
	var nonFinite *scoring.NonFiniteError
	switch {
	case errors.As(err, &nonFinite):
		return result, permanent(schema.KindNonFinite, "", "%s", nonFinite)
	case err != nil:
		return result, fmt.Errorf("score: %w", err)
	}
	return result, nil
}

// compose returns the event's score, with the time in the precision that the database keeps.
func (p *plan) compose(r scoring.Result) schema.Score {
	class, at := p.request.Class, time.Now().UTC().Truncate(time.Microsecond)
	s := Compose(p.event, class, p.model.Classes[class], r, p.deviations, at)
	if c := p.model.Cascade; p.request.Profile.Start == 0 && s.ClassGap.Value < c.Cut {
		s.RequestRiskProbability = c.Share
	}
	s.InclusionProbability = p.probability
	return s
}

func (m Model) class(c schema.Class) (int, error) {
	if c.Label != "" {
		if i := slices.Index(m.Classes, c.Label); i >= 0 {
			return i, nil
		}
		return 0, permanent(schema.KindUnknownClass, "data.class", "%s is no label of the ensemble's %d classes", c,
			len(m.Classes))
	}
	if c.Index < 0 || c.Index >= len(m.Classes) {
		return 0, permanent(schema.KindUnknownClass, "data.class", "is %d, the ensemble has the classes 0 to %d", c.Index,
			len(m.Classes)-1)
	}
	return c.Index, nil
}

// Key returns the identity of an event, from which its carrying component is derived.
func Key(source, id string) string { return source + "\n" + id }

// drawn reports whether an event belongs to a share of all events. It depends on the purpose and on the event's
// identity alone; the shares of two purposes are independent.
func drawn(ev schema.Event, purpose string, share float64) bool {
	return sampling.Uniform("", purpose, ev.Source, ev.ID) < share
}

// Compose returns the score of an event, for a caller that ran the scoring request itself. Deviations say how the
// request differed from the event.
func Compose(
	ev schema.Event, classIndex int, classLabel string, r scoring.Result, deviations []string, at time.Time,
) schema.Score {
	s := schema.Score{
		Event: ev, ClassIndex: classIndex, ClassLabel: classLabel,
		ClassGap: schema.Measurement(r.ClassGap), RequestRiskProbability: 1,
		Receipt: schema.Receipt(r.Receipt), ScoredAt: at,
	}
	if r.RequestRisk != nil {
		risk := schema.Measurement(*r.RequestRisk)
		s.RequestRisk = &risk
	}
	s.RequestRiskReason = schema.UnmeasuredReason(r.RequestRiskReason)
	if r.ImageRisk != nil {
		risk := schema.Measurement(*r.ImageRisk)
		s.ImageRisk = &risk
	}
	s.ImageRiskReason = schema.UnmeasuredReason(r.ImageRiskReason)
	s.Receipt.Deviations = deviations
	return s
}

// permanentError is an error after which retrying will not help.
type permanentError struct {
	*schema.Invalid
	kind schema.DeadLetterKind
}

func permanent(kind schema.DeadLetterKind, field, format string, args ...any) error {
	return &permanentError{&schema.Invalid{Field: field, Reason: fmt.Sprintf(format, args...)}, kind}
}

// Error returns "field: reason", or the reason if no field is wrong.
func (e *permanentError) Error() string {
	if e.Field == "" {
		return e.Reason
	}
	return e.Invalid.Error()
}

func (e *permanentError) Unwrap() error                         { return e.Invalid }
func (e *permanentError) DeadLetterKind() schema.DeadLetterKind { return e.kind }

// refusal makes a recorder's refusal of an id that belongs to another event a dead letter.
func refusal(err error) error {
	var invalid *schema.Invalid
	if errors.As(err, &invalid) && invalid.Field == "id" {
		return &permanentError{invalid, schema.KindDuplicateID}
	}
	return err
}

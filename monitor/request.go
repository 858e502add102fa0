package monitor

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// Model is an ensemble that stands for a production model, and how its events are scored.
type Model struct {
	Scorer  Scorer
	Classes []string        // labels in index order
	Profile scoring.Profile // the fixed profile
	// Diffusion is the ensemble's: it says how many steps the sampler of an event takes.
	Diffusion scoring.Diffusion
	// AsRequested scores each event with its own sampler settings instead of the fixed profile's. Thresholds belong to
	// settings, so each combination needs its own.
	AsRequested bool
	// SkipUnreproducible records an event that cannot be rerun as its producer ran it as a skip. Otherwise it is scored
	// all the same and the receipt says what was replaced.
	SkipUnreproducible bool
}

// Sampler is the name of the only sampler that reruns requests.
const Sampler = "ddim"

// samplerNames are the names of Sampler in the libraries that producers use, in lower case: diffusers' class, CompVis'
// class, and the name in user interfaces.
var samplerNames = []string{Sampler, "ddimscheduler", "ddimsampler"}

// drawnAs is the number type in which first latents are drawn again.
const drawnAs = "float32"

// plan is what is done with an event: a request that is scored, or a skip.
type plan struct {
	event      schema.Event
	request    scoring.Request
	deviations []string // where the request does not follow the event
	skip       *schema.Skip
}

// plan returns what is done with ev. The error, a permanent one, names the field that no ensemble can follow.
func (m Model) plan(ev schema.Event) (plan, error) {
	class, err := m.class(ev.Data.Class)
	if err != nil {
		return plan{}, err
	}
	p := plan{event: ev, request: scoring.Request{Key: Key(ev.Source, ev.ID), Class: class, Seed: ev.Data.Seed, Noise: ev.Data.Noise}}
	if i := ev.Data.BatchIndex; i != nil {
		p = m.replace(p, schema.SkipNoise, fmt.Sprintf(
			"noise: image %d of those drawn together cannot be drawn again, an image drawn alone was used", *i))
	}
	if t := ev.Data.NoiseDtype; t != "" && t != drawnAs && p.skip == nil {
		p = m.replace(p, schema.SkipNoise, fmt.Sprintf("noise: %s cannot be drawn again, %s was used", t, drawnAs))
	}
	s := ev.Data.Sampler
	switch {
	case p.skip != nil:
	case s != nil && !slices.Contains(samplerNames, strings.ToLower(s.Name)):
		p = m.replace(p, schema.SkipSampler, fmt.Sprintf("sampler: %s was replaced by %s", s.Name, Sampler))
	case m.AsRequested && s == nil:
		p = m.replace(p, schema.SkipSampler, "sampler: not in the event, the fixed profile was used")
	case m.AsRequested:
		p.request.Profile = m.Profile.WithSampler(m.Diffusion, s.Steps, s.GuidanceScale, s.Eta)
	}
	return p, nil
}

// score reruns the request of p. Where its own settings or noise cannot be rerun, the model's rule says what comes instead:
// the plan that is returned is the one that was carried out.
func (m Model) score(ctx context.Context, p plan) (result scoring.Result, _ plan, err error) {
	for p.skip == nil {
		result, err = m.Scorer.Score(ctx, p.request)
		next, again := m.instead(p, err)
		if !again {
			break
		}
		p, err = next, nil
	}
	var nonFinite *scoring.NonFiniteError
	switch {
	case errors.As(err, &nonFinite):
		return result, p, permanent(schema.KindNonFinite, "", "%s", nonFinite)
	case errors.Is(err, scoring.ErrUnknownClass):
		return result, p, permanent(schema.KindUnknownClass, "data.class", "%s", err)
	case err != nil:
		return result, p, fmt.Errorf("score: %w", err)
	}
	return result, p, nil
}

// instead returns what is done after the request of p ended with err, and whether that is another plan than p.
func (m Model) instead(p plan, err error) (plan, bool) {
	switch {
	case errors.Is(err, scoring.ErrNoise) && p.request.Noise != "":
		was := p.request.Noise
		p.request.Noise = ""
		return m.replace(p, schema.SkipNoise, fmt.Sprintf("noise: %s cannot be drawn again, the ensemble's own generator was used", was)), true
	case (errors.Is(err, scoring.ErrSettings) || errors.Is(err, scoring.ErrTooLarge)) && p.request.Profile != (scoring.Profile{}):
		p.request.Profile = scoring.Profile{}
		return m.replace(p, schema.SkipSettings, fmt.Sprintf("sampler settings: %s; the fixed profile was used", err)), true
	}
	return p, false
}

// replace returns p with a deviation, or as a skip where the model's rule says so.
func (m Model) replace(p plan, reason schema.SkipReason, deviation string) plan {
	if m.SkipUnreproducible {
		return plan{event: p.event, skip: &schema.Skip{Event: p.event, Reason: reason, Detail: deviation}}
	}
	p.deviations = append(slices.Clip(p.deviations), deviation)
	return p
}

func (m Model) class(c schema.Class) (int, error) {
	if c.Label != "" {
		if i := slices.Index(m.Classes, c.Label); i >= 0 {
			return i, nil
		}
		return 0, permanent(schema.KindUnknownClass, "data.class", "%s is no label of the ensemble's %d classes", c, len(m.Classes))
	}
	if c.Index < 0 || c.Index >= len(m.Classes) {
		return 0, permanent(schema.KindUnknownClass, "data.class", "is %d, the ensemble has the classes 0 to %d", c.Index, len(m.Classes)-1)
	}
	return c.Index, nil
}

// Key returns the identity of an event from which its carrying component is derived.
func Key(source, id string) string { return source + "\n" + id }

// sampled reports whether an event belongs to a share of all events, by a number in [0, 1) that its identity gives.
func sampled(ev schema.Event, share float64) bool {
	sum := sha256.Sum256([]byte("sample\n" + Key(ev.Source, ev.ID)))
	return float64(binary.BigEndian.Uint64(sum[:8])>>11)/(1<<53) < share
}

// Compose returns the score of an event, for a caller that ran the scoring request itself. Deviations say where the
// request did not follow the event.
func Compose(ev schema.Event, classIndex int, classLabel string, r scoring.Result, deviations []string, at time.Time) schema.Score {
	s := schema.Score{
		Event: ev, ClassIndex: classIndex, ClassLabel: classLabel,
		ClassGap: schema.Measurement(r.ClassGap), RequestRisk: schema.Measurement(r.RequestRisk), Receipt: schema.Receipt(r.Receipt), ScoredAt: at,
	}
	s.Receipt.Deviations = deviations
	return s
}

func compose(ev schema.Event, m Model, p plan, r scoring.Result, at time.Time) schema.Score {
	return Compose(ev, p.request.Class, m.Classes[p.request.Class], r, p.deviations, at)
}

// permanentError is an error that no further delivery can mend.
type permanentError struct {
	*schema.Invalid
	kind schema.DeadLetterKind
}

func permanent(kind schema.DeadLetterKind, field, format string, args ...any) error {
	return &permanentError{&schema.Invalid{Field: field, Reason: fmt.Sprintf(format, args...)}, kind}
}

// Error returns "field: reason", or the reason where no field is wrong.
func (e *permanentError) Error() string {
	if e.Field == "" {
		return e.Reason
	}
	return e.Invalid.Error()
}

func (e *permanentError) Unwrap() error                         { return e.Invalid }
func (e *permanentError) DeadLetterKind() schema.DeadLetterKind { return e.kind }

// refusal gives a kind to a recorder's refusal of an identifier that belongs to another message.
func refusal(err error) error {
	var invalid *schema.Invalid
	if errors.As(err, &invalid) && invalid.Field == "id" {
		return &permanentError{invalid, schema.KindDuplicateID}
	}
	return err
}

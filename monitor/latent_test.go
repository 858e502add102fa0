package monitor_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/decuwatch/decuwatch/monitor"
	"github.com/decuwatch/decuwatch/monitor/replay"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring"
)

// objects are latents by their names.
type objects map[string][]byte

var errStoreAway = errors.New("the store is away")

func (o objects) Latent(_ context.Context, ref schema.Latent, _ time.Time) ([]byte, error) {
	if ref.Name == "away" {
		return nil, errStoreAway
	}
	object, found := o[ref.Name]
	if !found {
		return nil, fmt.Errorf("%w: %s", schema.ErrLatentMissing, ref.Name)
	}
	return object, nil
}

func TestLatentsOfEvents(t *testing.T) {
	const names = "m" // the model of the events
	raw := make([]byte, 0, 16)
	for i := range 4 {
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(float32(i)))
	}
	infinite := append(binary.LittleEndian.AppendUint32(nil, 0x7f800000), raw[4:]...)
	diffusion := scoring.Diffusion{TrainTimesteps: 1000, BetaSchedule: "linear", BetaStart: 0.0001, BetaEnd: 0.02,
		Prediction: "epsilon", TimestepSpacing: "leading"}
	place := func(object []byte) *schema.Latent {
		l, err := schema.Latent{Name: "good", Format: "raw", Dtype: "float32", Shape: []int{1, 2, 2}}.Place(names, object)
		if err != nil {
			t.Fatal(err)
		}
		return &l
	}
	with := func(change func(*schema.Latent)) schema.Event {
		e := event("1")
		e.Data.Model, e.Data.Latent, e.Data.Noise = names, place(raw), "nobody's"
		e.Data.Sampler = &schema.Sampler{Name: "ddim", Steps: 20, GuidanceScale: 2}
		change(e.Data.Latent)
		return e
	}
	for name, c := range map[string]struct {
		change func(*schema.Latent)
		says   string // of the skip; "" for a score
	}{
		"a first latent":      {func(*schema.Latent) {}, ""},
		"a later latent":      {func(l *schema.Latent) { l.Step, l.Timestep = 5, new(700.0) }, ""},
		"missing":             {func(l *schema.Latent) { l.Name = "gone" }, "no such object"},
		"another model's":     {func(l *schema.Latent) { l.Bucket = "LATENTS_n" }, "read from LATENTS_m"},
		"another shape":       {func(l *schema.Latent) { l.Shape = []int{2, 2, 2} }, "[1 2 2]"},
		"another object":      {func(l *schema.Latent) { l.SHA256 = strings.Repeat("0", 64) }, "SHA-256"},
		"another type":        {func(l *schema.Latent) { l.Dtype = "float16" }, "16 bytes of numbers"},
		"infinite":            {func(l *schema.Latent) { *l = *place(infinite); l.Name = "infinite" }, "element 0 is +Inf"},
		"of another timestep": {func(l *schema.Latent) { l.Step, l.Timestep = 5, new(701.0) }, "has 700 there"},
		"after the last step": {func(l *schema.Latent) { l.Step, l.Timestep = 20, new(0.0) }, "the sampler takes 20"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, monitor.Model{Latents: objects{"good": raw, "infinite": infinite}, Diffusion: diffusion,
				Latent: scoring.LatentShape{Channels: 1, Height: 2, Width: 2}})
			e := with(c.change)
			if err := f.Handle(t.Context(), e, first(1)); err != nil {
				t.Fatal(err)
			}
			v := f.recorder.order[0]
			if (v.Skip != nil) != (c.says != "") || v.Skip != nil &&
				(v.Skip.Reason != schema.SkipLatent || !strings.Contains(v.Skip.Detail, c.says)) {
				t.Fatalf("skip %+v, want %q", v.Skip, c.says)
			}
			if v.Score == nil {
				return
			}
			r := f.scorer.requests[0]
			if r.Latent == nil || len(r.Latent.Values) != 4 || r.Latent.Values[3] != 3 || r.Latent.Step != e.Data.Latent.Step ||
				r.Profile.Start != r.Latent.Step || len(v.Score.Receipt.Deviations) != 0 {
				t.Errorf("request %+v, latent %+v, deviations %q", r, r.Latent, v.Score.Receipt.Deviations)
			}
		})
	}
	f := newFixture(t, monitor.Model{Latents: objects{}, Latent: scoring.LatentShape{Channels: 1, Height: 2, Width: 2}})
	away := with(func(l *schema.Latent) { l.Name = "away" })
	if err := f.Handle(t.Context(), away, first(1)); !errors.Is(err, errStoreAway) || len(f.recorder.order) != 0 {
		t.Errorf("the store is away: %v, verdicts %v", err, f.recorder.order)
	}
	f = newFixture(t, monitor.Model{})
	if err := f.Handle(t.Context(), with(func(*schema.Latent) {}), first(1)); err != nil ||
		f.recorder.order[0].Skip == nil {
		t.Errorf("a model without latents: %v", err)
	}

	// A replay needs the latent again, and says so if it is gone.
	score := &schema.Score{Event: with(func(*schema.Latent) {}), RequestRisk: &schema.Measurement{}}
	score.Receipt.LatentSHA256 = score.Event.Data.Latent.SHA256
	request, err := replay.Prepare(t.Context(), objects{"good": raw}, score)
	if err != nil || len(request.Latent.Values) != 4 {
		t.Errorf("%+v %v", request, err)
	}
	if _, err := replay.Prepare(t.Context(), objects{}, score); !errors.Is(err, schema.ErrLatentMissing) {
		t.Errorf("a latent that is gone: %v", err)
	}
	if _, err := replay.Prepare(t.Context(), nil, score); !errors.Is(err, scoring.ErrNoise) {
		t.Errorf("no latents: %v", err)
	}
}

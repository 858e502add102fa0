package scoring

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// A request that brings the first latent that the seed would draw has the same score, to the last bit.
func TestFirstLatentOfTheRequest(t *testing.T) {
	e := open(t, tiny2, Options{Threads: 1})
	r := Request{Key: "k", Class: told, Seed: 7}
	want, err := e.Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	own := r
	own.Seed, own.Noise = 0, "nobody's"
	own.Latent = &Latent{SHA256: "digest", Values: firstLatent(t, e, r)}
	have, err := e.Score(t.Context(), own)
	if err != nil {
		t.Fatal(err)
	}
	if have.ClassGap.Value != want.ClassGap.Value || have.RequestRisk.Value != want.RequestRisk.Value ||
		have.ImageRisk.Value != want.ImageRisk.Value {
		t.Errorf("own latent: %+v\nof the seed: %+v", have, want)
	}
	if have.Receipt.LatentSHA256 != "digest" || want.Receipt.LatentSHA256 != "" {
		t.Errorf("receipts %+v and %+v", have.Receipt, want.Receipt)
	}
	own.Latent = &Latent{SHA256: "digest"}
	if err := e.Validate(own); err != nil {
		t.Errorf("validated without its numbers: %v", err)
	}
	if _, err := e.Score(t.Context(), own); !errors.Is(err, ErrNoise) || !strings.Contains(err.Error(), "digest") {
		t.Errorf("scored without its numbers: %v", err)
	}
	own.Profile = e.Profile()
	own.Profile.Eta = 0.5
	if err := e.Validate(own); !errors.Is(err, ErrNoise) {
		t.Errorf("noise of the steps by an unknown generator: %v", err)
	}
}

// A request that brings the latent to which the carrier takes the seed's has the same score as one that branches there,
// for fewer rows.
func TestLaterLatentOfTheRequest(t *testing.T) {
	e := open(t, tinyTokens, Options{Threads: 1})
	for _, eta := range []float64{0, 0.7} {
		profile := Profile{GuidanceScale: 2, Eta: eta, ClassGap: at(8, 3, 1, ensemble.PaiDEW2),
			RequestRisk: at(8, 4, 3, ensemble.MeanW2)}
		r := Request{Key: "k", Class: 1, Seed: 7, Profile: profile}
		want, err := e.Score(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		p, err := e.compile(profile, []Measure{at(8, 0, 4, ensemble.MeanW2)})
		if err != nil {
			t.Fatal(err)
		}
		own := r
		own.Latent = &Latent{SHA256: "digest", Step: 3}
		// The path of the carrier after three steps, with the noise of the third.
		p3, err := e.compile(profile, []Measure{at(8, 0, 3, ensemble.MeanW2)})
		if err != nil {
			t.Fatal(err)
		}
		task, _, err := e.run(t.Context(), r, p3)
		if err != nil {
			t.Fatal(err)
		}
		own.Latent.Values = slices.Clone(task.means[0][want.Receipt.Carrier])
		if eta > 0 {
			noisy, _, err := e.run(t.Context(), r, p)
			if err != nil {
				t.Fatal(err)
			}
			p.trajectories[0].steps[2].AddNoise(own.Latent.Values, noisy.noise[2])
		}
		own.Profile = profile.From(e.ensemble.Diffusion, 3)
		have, err := e.Score(t.Context(), own)
		if err != nil {
			t.Fatal(err)
		}
		if have.ClassGap.Value != want.ClassGap.Value || have.RequestRisk.Value != want.RequestRisk.Value {
			t.Errorf("eta %v: from step 3 %v and %v, from the first step %v and %v", eta, have.ClassGap.Value,
				have.RequestRisk.Value, want.ClassGap.Value, want.RequestRisk.Value)
		}
		if have.Receipt.Rows != want.Receipt.Rows-3*2 || have.Receipt.LatentStep != 3 ||
			!strings.Contains(have.Receipt.Settings, "start=3") {
			t.Errorf("receipt %+v, from the first step %+v", have.Receipt, want.Receipt)
		}
		evidence, err := e.Evidence(t.Context(), own)
		if err != nil || evidence.Result.RequestRisk.Value != have.RequestRisk.Value {
			t.Errorf("evidence: risk %v, %v", evidence.Result.RequestRisk.Value, err)
		}
		if own.Profile = profile; e.Validate(own) == nil {
			t.Error("a later latent at the first step was accepted")
		}
	}
}

// From moves every measurement of a profile to the latent's step or leaves it after that.
func TestProfileFromAStep(t *testing.T) {
	e := open(t, tiny2, Options{Threads: 1})
	profile := e.Profile().WithSampler(e.ensemble.Diffusion, 10, 2, 0)
	for step := range 10 {
		from := profile.From(e.ensemble.Diffusion, step)
		if err := from.Validate(&e.ensemble.Manifest); err != nil {
			t.Errorf("step %d: %v", step, err)
		}
		if from.ClassGap.BranchStep != step || from.RequestRisk.BranchStep != step || from.ImageRisk.BranchStep != step {
			t.Errorf("step %d: %+v", step, from)
		}
	}
	if err := profile.From(e.ensemble.Diffusion, 10).Validate(&e.ensemble.Manifest); err == nil {
		t.Error("a latent after the last step was accepted")
	}
}

func TestLatentValues(t *testing.T) {
	half := func(bits ...uint16) (b []byte) {
		for _, v := range bits {
			b = binary.LittleEndian.AppendUint16(b, v)
		}
		return b
	}
	float := binary.LittleEndian.AppendUint32(nil, math.Float32bits(-1.5))
	for _, c := range []struct {
		dtype   string
		numbers []byte
		want    []float32
		says    string
	}{
		{"float16", half(0x3c00, 0xc000, 0x3555), []float32{1, -2, 0.333251953125}, ""},
		{"bfloat16", half(0x3f80, 0xc000, 0x3eab), []float32{1, -2, 0.333984375}, ""},
		{"float32", float, []float32{-1.5}, ""},
		{"float16", half(0x3c00, 0x7c00), nil, "element 1 is +Inf"},
		{"bfloat16", half(0x7fc0), nil, "element 0 is NaN"},
		{"float32", binary.LittleEndian.AppendUint32(nil, 0xff800000), nil, "element 0 is -Inf"},
		{"int8", nil, nil, "int8"},
	} {
		have, err := LatentValues(c.numbers, c.dtype)
		if !slices.Equal(have, c.want) || (err == nil) != (c.says == "") ||
			err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, %v, want %v", c.dtype, have, err, c.want)
		}
	}
}

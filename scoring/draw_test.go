package scoring

import (
	"errors"
	"strings"
	"testing"
)

// A draw is part of the request: another one gives another score, the receipt names it, and what cannot be drawn again
// is refused by name.
func TestDrawsOfARequest(t *testing.T) {
	e := open(t, tinyTokens, Options{Threads: 1})
	score := func(r Request) Result {
		t.Helper()
		result, err := e.Score(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		return result
	}
	request := Request{Key: "k", Class: 1, Seed: 7, Noise: "torch-cuda"}
	plain := score(request)
	for name, draw := range map[string]Draw{
		"float16":       {Dtype: "float16"},
		"a later draw":  {Offset: 4},
		"of a batch":    {Batch: Batch{Index: 2, Size: 8}},
		"a small GPU":   {GPU: GPU{SMs: 1, ThreadsPerSM: 256}, Batch: Batch{Index: 2, Size: 8}},
		"a usual GPU":   {GPU: GPU{SMs: 132, ThreadsPerSM: 2048}},
		"named float32": {Dtype: "float32"},
	} {
		request.Draw = draw
		result := score(request)
		same := name == "a usual GPU" || name == "named float32"
		if (result.RequestRisk.Value == plain.RequestRisk.Value) != same {
			t.Errorf("%s: risk %v, of a plain draw %v", name, result.RequestRisk.Value, plain.RequestRisk.Value)
		}
		r := result.Receipt
		told := Draw{Dtype: r.NoiseDtype, GPU: GPU{SMs: r.SMs, ThreadsPerSM: r.ThreadsPerSM}, Offset: r.NoiseOffset,
			Batch: Batch{Index: r.BatchIndex, Size: r.BatchSize}}
		if told != draw {
			t.Errorf("%s: the receipt says %+v", name, told)
		}
	}
	for says, draw := range map[string]Draw{
		"PyTorch":                   {Dtype: "bfloat16"},
		"only torch-cuda has a GPU": {Offset: 4},
		"at most":                   {Batch: Batch{Index: 0, Size: 1 << 20}},
	} {
		err := e.Validate(Request{Noise: "torch-cpu", Draw: draw})
		if !errors.Is(err, ErrNoise) || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v, want %q", draw, err, says)
		}
	}
}

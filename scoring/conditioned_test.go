package scoring

import (
	"encoding/json"
	"math"
	"os"
	"strconv"
	"testing"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// tinyConditioned has further inputs of the backbone: a pooled vector, and a single number.
const tinyConditioned = "testdata/tiny-conditioned"

// The backbone is given each class's rows of every further input: trajectories equal PyTorch's.
func TestConditioningEqualsPyTorch(t *testing.T) {
	content, err := os.ReadFile(tinyConditioned + "/conditioned.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		Cases []struct {
			Class    int         `json:"class"`
			Seed     string      `json:"seed"`
			Steps    int         `json:"steps"`
			Guidance float64     `json:"guidance_scale"`
			Finals   [][]float32 `json:"finals"`
		} `json:"cases"`
	}
	if err := json.Unmarshal(content, &golden); err != nil {
		t.Fatal(err)
	}
	e := open(t, tinyConditioned, Options{Threads: 1})
	worst := 0.0
	for _, c := range golden.Cases {
		seed, err := strconv.ParseUint(c.Seed, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		r := Request{Key: "k", Class: c.Class, Seed: seed, Profile: profileOf(c.Steps, 0, 1, 0)}
		r.Profile.GuidanceScale = c.Guidance
		out, err := e.Rollout(t.Context(), r, ensemble.TablesMembers)
		if err != nil {
			t.Fatal(err)
		}
		for m, want := range c.Finals {
			difference, norm := 0.0, 0.0
			for i, v := range out.Latents[ensemble.TablesMembers][m] {
				difference += math.Pow(float64(v-want[i]), 2)
				norm += math.Pow(float64(want[i]), 2)
			}
			worst = max(worst, math.Sqrt(difference/norm))
		}
	}
	if t.Logf("%d cases, largest relative difference %.1e", len(golden.Cases), worst); !(worst <= 1e-4) {
		t.Errorf("a final latent differs by %v", worst)
	}
	// All sets and both kinds of guidance run, with the judge.
	result, err := e.Score(t.Context(), Request{Key: "k", Class: told, Seed: 7})
	if err != nil || result.ImageRisk == nil {
		t.Errorf("%+v %v", result, err)
	}
}

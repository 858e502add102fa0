package scoring

import (
	"math"
	"slices"
	"testing"

	"github.com/decuwatch/decuwatch/scoring/ensemble"
)

// A roll-out ends where the measurement of a roll-out of all steps reads its means, and the reference's like any other
// table's: an ensemble with the reference in a component's place ends there with that component.
func TestRollout(t *testing.T) {
	e := open(t, shipped, Options{})
	latent := e.Ensemble().Latent
	profile := e.Profile()
	steps := profile.RequestRisk.Steps
	whole := at(steps, 0, steps, ensemble.MeanW2)
	profile.ClassGap, profile.RequestRisk = whole, whole
	r := Request{Key: "rollout\n1", Class: 3, Seed: 7, Profile: profile}
	rollout, err := e.Rollout(t.Context(), r, ensemble.TablesMembers, ensemble.TablesReference)
	if err != nil {
		t.Fatal(err)
	}
	members, reference := rollout.Latents[ensemble.TablesMembers], rollout.Latents[ensemble.TablesReference][0]
	if m := e.Ensemble().Components; len(members) != m || rollout.Rows != 2*steps*(m+1) {
		t.Fatalf("%d latents of %d rows, want %d of %d", len(members), rollout.Rows, m, 2*steps*(m+1))
	}
	result, err := e.Score(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	for i, a := range members {
		for j, b := range members {
			distance := 0.0
			for k := range a {
				distance += math.Pow(float64(a[k])-float64(b[k]), 2)
			}
			if want := result.RequestRisk.Distances[i][j]; !Agrees(distance, want) {
				t.Errorf("components %d and %d end %v apart, the score says %v", i, j, distance, want)
			}
		}
	}
	if len(reference) != latent.Size() {
		t.Fatalf("the reference ends in %d elements, want %d", len(reference), latent.Size())
	}

	// Give component 0 the reference's table: it ends where the reference ends.
	for class := range len(e.ensemble.Classes) + 1 {
		copy(e.ensemble.Members().Row(0, class), e.ensemble.Tables(ensemble.TablesReference).Row(0, class))
	}
	swapped, err := e.Rollout(t.Context(), r, ensemble.TablesMembers, ensemble.TablesReference)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.EqualFunc(swapped.Latents[ensemble.TablesMembers][0], reference, func(a,
		b float32) bool {
		return Agrees(float64(a), float64(b)) || math.Abs(float64(a-b)) < 1e-4
	}) {
		t.Error("the reference ends elsewhere than a component with its table")
	}
	if slices.Equal(members[0], reference) {
		t.Error("component 0 ends where the reference does, with another table")
	}
}

// The images of a class are those of the reference, the same each time, and each of its own seed.
func TestClassImages(t *testing.T) {
	for _, name := range []string{tiny, "testdata/tiny-2"} {
		e := open(t, name, Options{})
		images, err := e.ClassImages(t.Context(), 2, 3)
		if err != nil || len(images) != 3 {
			t.Fatalf("%s: %d images, %v", name, len(images), err)
		}
		again, err := e.ClassImages(t.Context(), 2, 2)
		if err != nil || !slices.Equal(again[1], images[1]) || slices.Equal(images[0], images[1]) {
			t.Errorf("%s: other images the second time, or all alike: %v", name, err)
		}
		rollout, err := e.Rollout(t.Context(), Request{Class: 2, Seed: 1, Profile: e.evidenceProfile(e.fixed)},
			ensemble.TablesReference)
		if err != nil {
			t.Fatal(err)
		}
		pictures, err := e.Pictures(t.Context(), rollout.Latents[ensemble.TablesReference])
		if err != nil || !slices.Equal(pictures[0].Image, images[1]) {
			t.Errorf("%s: it is not the reference's image: %v", name, err)
		}
		if _, err := e.ClassImages(t.Context(), 99, 1); err == nil {
			t.Errorf("%s: images of class 99", name)
		}
	}
}

package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/evaluation"
)

// The verb evaluates all manifests of one backbone together, and writes the JSON that it prints.
func TestEval(t *testing.T) {
	user := command{t: t}
	dir := filepath.Join(t.TempDir(), "ensemble")
	if err := os.CopyFS(dir, os.DirFS(faultEnsemble)); err != nil {
		t.Fatal(err)
	}
	// A rotation: the same classes with each other's numbers of images.
	rewrite(t, filepath.Join(dir, ensemble.ManifestName), filepath.Join(dir, "rotation-1.json"),
		func(m map[string]any) {
			classes := m["classes"].([]any)
			for i, j := 0, len(classes)-1; i < j; i, j = i+1, j-1 {
				a, b := classes[i].(map[string]any), classes[j].(map[string]any)
				a["images"], b["images"] = b["images"], a["images"]
			}
		})
	out := filepath.Join(t.TempDir(), "results")
	args := []string{"eval", dir, "--seeds=3", "--error-steps=4",
		"--profile=steps=4,guidance=1,class_gap=0+1:paide-w2,request_risk=0+4:mean-w2",
		"--profile=steps=5,guidance=2,class_gap=4+1:paide-w2", "--json", "--out=" + out}
	stdout, _ := user.run(exitOK, args...)
	r := decode[evaluation.Results](t, stdout)
	e, err := ensemble.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	classes := len(e.Classes)
	if len(r.Manifests) != 2 || r.Requests != 2*classes*3 || len(r.Scores) != 4 || r.Error == nil || r.Error.Steps != 4 {
		t.Fatalf("results are %+v", r)
	}
	m := e.Components
	for i, rows := range []int{m, 4 * m} { // w (b + r M) with w = 1
		score := r.Scores[i]
		if score.Rows != rows || score.Measurement != schema.MeasurementNames()[i] || score.ProfileRows != 4*m {
			t.Errorf("score %d is %s of %d rows, %d in its profile", i, score.Measurement, score.Rows, score.ProfileRows)
		}
	}
	if want := 2 * (4 + m); r.Scores[2].Rows != want { // four shared steps and one branched, with guidance
		t.Errorf("a branch at the last step costs %d rows, want %d", r.Scores[2].Rows, want)
	}
	for _, score := range r.Scores {
		if len(score.ClassLevel.Means) != len(r.Bins) || len(score.ClassLevel.Against) != len(r.Bins)-1 ||
			score.RequestLevel == nil || score.RequestLevel.Within == nil {
			t.Errorf("%s has %+v and %+v", score.Settings, score.ClassLevel, score.RequestLevel)
		}
	}
	for i, score := range r.Scores { // PaiDE has an upper bound, the mean distance has none
		if score.Saturated < 0 || score.Saturated > 1 || i%2 == 1 && score.Saturated != 0 {
			t.Errorf("%s is saturated in %v of its requests", score.Settings, score.Saturated)
		}
	}
	stored, err := os.ReadFile(filepath.Join(out, "results.json"))
	if err != nil || string(stored) != stdout {
		t.Errorf("results.json is not what was printed: %v", err)
	}
}

// Without the fully trained table no error can be compared with scores, and the verb says so.
func TestEvalWithoutReference(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ensemble")
	if err := os.CopyFS(dir, os.DirFS(faultEnsemble)); err != nil {
		t.Fatal(err)
	}
	e, err := ensemble.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	var numbers []byte
	for component := range e.Components {
		for class := range len(e.Classes) + 1 {
			for _, v := range e.Members().Row(component, class) {
				numbers = binary.LittleEndian.AppendUint32(numbers, math.Float32bits(v))
			}
		}
	}
	header := fmt.Sprintf(`{"tables":{"dtype":"F32","shape":[%d,%d,%d],"data_offsets":[0,%d]}}`, e.Components,
		len(e.Classes)+1, e.Context.Dim, len(numbers))
	content := append(append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...), numbers...)
	if err := os.WriteFile(filepath.Join(dir, e.Files.Tables.Path), content, 0o600); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(dir, ensemble.ManifestName)
	rewrite(t, manifest, manifest, func(m map[string]any) {
		tables := m["files"].(map[string]any)["tables"].(map[string]any)
		tables["size"], tables["sha256"] = len(content), fmt.Sprintf("%x", sha256.Sum256(content))
	})
	user := command{t: t}
	out, _ := user.run(exitOK, "eval", dir, "--seeds=2")
	holds(t, out, "1 rotations", `has no tensor "reference"`)
	user.run(exitUsage, "eval", dir, "--seeds=1")
	user.run(exitUsage, "eval", dir, "--profile=steps=ten")
	user.run(exitFailed, "eval", filepath.Dir(dir))
}

// rewrite writes a changed copy of a manifest.
func rewrite(t *testing.T, from, to string, change func(map[string]any)) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	m := decode[map[string]any](t, string(content))
	change(m)
	if content, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

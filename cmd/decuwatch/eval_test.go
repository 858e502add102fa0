package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/scoring/ensemble"
	"github.com/decuwatch/decuwatch/scoring/evaluation"
)

// The verb evaluates all manifests of one backbone together, and writes the JSON that it prints.
func TestEval(t *testing.T) {
	user := command{t: t}
	dir := copied(t)
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
	r := decode[evaluation.Results](t, stdout).Ensembles[0]
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
		if score.Rows != rows || score.Measurement != schema.MeasurementNames()[i] || r.Profiles[0].Rows != 4*m {
			t.Errorf("score %d is %s of %d rows, %d in its profile", i, score.Measurement, score.Rows, r.Profiles[0].Rows)
		}
	}
	if want := 2 * (4 + m); r.Scores[2].Rows != want { // four shared steps and one branched, with guidance
		t.Errorf("a branch at the last step costs %d rows, want %d", r.Scores[2].Rows, want)
	}
	for _, score := range r.Scores {
		if len(score.ClassLevel.Means) != len(r.Bins) || len(score.ClassLevel.Against) != len(r.Bins)-1 ||
			score.MembersLevel == nil || score.MembersLevel.Within == nil || score.RequestLevel != nil {
			t.Errorf("%s has %+v", score.Settings, score.Levels)
		}
	}
	for i, score := range r.Scores { // PaiDE has an upper bound, the mean distance has none
		if score.Saturated < 0 || score.Saturated > 1 || i%2 == 1 && score.Saturated != 0 {
			t.Errorf("%s is saturated in %v of its requests", score.Settings, score.Saturated)
		}
	}
	stored, err := os.ReadFile(filepath.Join(out, "results.json"))
	var line bytes.Buffer
	if err == nil {
		err = json.Compact(&line, stored)
	}
	if err != nil || line.String() != strings.TrimSpace(stdout) {
		t.Errorf("results.json is not what was printed: %v", err)
	}
}

// Scores are held against a producer that is not a member, beside the error of a second producer.
func TestEvalAgainstProducers(t *testing.T) {
	user, dir := command{t: t}, copied(t)
	e, err := ensemble.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	row := func(set string, table int) []float32 {
		var all []float32
		for class := range len(e.Classes) + 1 {
			all = append(all, e.Tables(set).Row(table, class)...)
		}
		return all
	}
	first, second, other := row(ensemble.TablesMembers, 0), row(ensemble.TablesMembers, 1), row(ensemble.TablesMembers, 2)
	// A posterior table has the producer's unconditional row.
	draw := append(slices.Clone(second[:len(e.Classes)*e.Context.Dim]), first[len(e.Classes)*e.Context.Dim:]...)
	retable(t, dir, e, map[string][][]float32{
		"tables": {first, second}, "reference": {row(ensemble.TablesReference, 0)}, "producer": {first},
		"producers": {other, other}, "posterior": {first, draw},
	}, func(m map[string]any) {
		m["format"], m["components"], m["posterior"] = ensemble.Format2, 2, 2
		delete(m, "reference")
		for _, class := range m["classes"].([]any) {
			c := class.(map[string]any)
			c["images"], c["draws"] = c["images"].([]any)[:2], 100
		}
		measure := func(tables, estimator string, rollout int) map[string]any {
			return map[string]any{"tables": tables, "steps": 3, "guidance": "shared", "branch_step": 0,
				"rollout_steps": rollout, "estimator": estimator}
		}
		m["profile"] = map[string]any{"guidance_scale": 2, "eta": 0, "reason": "", "class_gap": measure("posterior",
			"paide-w2", 1), "request_risk": measure("members", "mean-w2", 2)}
	})
	args := []string{"eval", dir, dir, "--seeds=4", "--error-steps=4"}
	stdout, _ := user.run(exitOK, append(args, "--json")...)
	r := decode[evaluation.Results](t, stdout)
	if len(r.Ensembles) != 2 || len(r.SideBySide) == 0 {
		t.Fatalf("results are %+v", r)
	}
	for _, f := range r.SideBySide {
		if f.Spread == nil || math.Abs(*f.Spread) > 0.2 { // the ensemble and itself, but for rounding
			t.Errorf("%s spreads over %v", f.Name, f.Spread)
		}
	}
	one := r.Ensembles[0]
	// 30 requests of each class calibrate a threshold of its own, and 30 are counted.
	if a := one.Alarms[1]; a.Reason != "" || a.All.Scores != 30*len(e.Classes) || a.Classes[0].Scores != 30 ||
		a.All.High <= a.All.Low {
		t.Errorf("false alarms are %+v", a)
	}
	if one.Ceiling == nil || one.Ceiling.Within == nil || one.Ceiling.Within.Value != 1 { // both producers are alike
		t.Errorf("ceiling is %+v", one.Ceiling)
	}
	gap, risk := one.Scores[0], one.Scores[1]
	if gap.Rows != 3 || risk.Rows != 6 || one.Profiles[0].Rows != 9 || len(risk.ByMembers) != 1 {
		t.Errorf("rows are %d and %d, %d together", gap.Rows, risk.Rows, one.Profiles[0].Rows)
	}
	if risk.RequestLevel == nil || risk.MembersLevel == nil || risk.OfCeiling == nil ||
		*risk.OfCeiling != risk.RequestLevel.Within.Value {
		t.Errorf("request risk is %+v", risk)
	}
	out, _ := user.run(exitOK, args...)
	holds(t, out, "a second producer's error", "own members (old)", "Side by side", "mean-w2@0+2/3:members:shared")
}

// A truth judge says which of the producer's images are wrong. It cannot be the ensemble's own.
func TestEvalWithTruth(t *testing.T) {
	const path = "../../scoring/testdata/tiny-2"
	e, err := ensemble.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	graph, err := os.ReadFile(filepath.Join(path, e.Files.Judge.Path))
	if err != nil {
		t.Fatal(err)
	}
	document, err := json.Marshal(e.Judge)
	if err != nil {
		t.Fatal(err)
	}
	truth := t.TempDir()
	write := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(truth, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("judge.json", document)
	write("judge.onnx", graph)
	user, args := command{t: t}, []string{"eval", path, "--seeds=4", "--error-steps=4", "--truth=" + truth}
	_, stderr := user.run(exitUsage, args...)
	holds(t, stderr, truth, "must be an independent one")
	write("judge.onnx", append(graph, "\x12\x05truth"...)) // the same graph, of another producer_name
	stdout, _ := user.run(exitOK, append(args, "--json")...)
	r := decode[evaluation.Results](t, stdout).Ensembles[0]
	cannot := 0
	for class := range e.Classes {
		if !e.Judge.CanTell(class) {
			cannot++
		}
	}
	if cannot == 0 || len(r.Truths) != 1 || r.Truths[0].Requests != (len(e.Classes)-cannot)*4 {
		t.Fatalf("truths are %+v; %d classes cannot be told", r.Truths, cannot)
	}
	image := r.Scores[2]
	if image.Measurement != schema.ImageRisk || image.Measured != r.Truths[0].Requests ||
		image.Rows != 6 || r.Profiles[0].Rows != r.Scores[0].Rows+r.Scores[1].Rows+6 {
		t.Errorf("image risk is %+v", image)
	}
	for _, s := range r.Scores {
		if len(s.ImageLevels) != 1 {
			t.Errorf("%s has the image levels %+v", s.Measurement, s.ImageLevels)
		}
	}
	// The truth and the judge of the ensemble are one graph: what it takes for another class has the higher risk.
	if c := r.Truths[0].Ceiling; c == nil || c.AUROC != nil && c.AUROC.Value < 0.5 {
		t.Errorf("the judge on the images themselves has %+v", c)
	}
	out, _ := user.run(exitOK, args...)
	holds(t, out, "Truth 1", "judge on the image itself")
	write("judge.json", []byte(`{"input": "image"}`))
	_, stderr = user.run(exitFailed, args...)
	holds(t, stderr, truth, "field output is missing")
}

// Without the fully trained table no error can be compared with scores, and the verb says so.
func TestEvalWithoutReference(t *testing.T) {
	dir := copied(t)
	e, err := ensemble.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	var members [][]float32
	for component := range e.Components {
		members = append(members, nil)
		for class := range len(e.Classes) + 1 {
			members[component] = append(members[component], e.Members().Row(component, class)...)
		}
	}
	retable(t, dir, e, map[string][][]float32{"tables": members}, func(map[string]any) {})
	user := command{t: t}
	out, _ := user.run(exitOK, "eval", dir, "--seeds=2")
	holds(t, out, "1 rotations", `has no tensor "reference"`)
	user.run(exitUsage, "eval", dir, "--seeds=1")
	user.run(exitUsage, "eval", dir, "--alpha=0")
	user.run(exitUsage, "eval", dir, "--alarm-seeds=1")
	user.run(exitUsage, "eval", dir, "--profile=steps=ten")
	user.run(exitFailed, "eval", filepath.Dir(dir))
	user.run(exitFailed, "eval", dir, "--truth="+dir)
}

// copied returns the directory of a copy of the tiny ensemble.
func copied(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ensemble")
	if err := os.CopyFS(dir, os.DirFS(faultEnsemble)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// retable replaces the tables of an ensemble, given by tensor, and changes its manifest.
func retable(t *testing.T, dir string, e *ensemble.Ensemble, tables map[string][][]float32,
	change func(map[string]any)) {
	t.Helper()
	type tensor struct {
		Type    string `json:"dtype"`
		Shape   []int  `json:"shape"`
		Offsets [2]int `json:"data_offsets"`
	}
	header, numbers := map[string]tensor{}, []byte(nil)
	for name, set := range tables {
		from := len(numbers)
		for _, table := range set {
			for _, v := range table {
				numbers = binary.LittleEndian.AppendUint32(numbers, math.Float32bits(v))
			}
		}
		shape := []int{len(set), len(e.Classes) + 1, e.Context.Dim}
		if name == "reference" || name == "producer" {
			shape = shape[1:]
		}
		header[name] = tensor{"F32", shape, [2]int{from, len(numbers)}}
	}
	document, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	content := binary.LittleEndian.AppendUint64(nil, uint64(len(document)))
	content = append(append(content, document...), numbers...)
	if err := os.WriteFile(filepath.Join(dir, e.Files.Tables.Path), content, 0o600); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(dir, ensemble.ManifestName)
	rewrite(t, manifest, manifest, func(m map[string]any) {
		file := m["files"].(map[string]any)["tables"].(map[string]any)
		file["size"], file["sha256"] = len(content), fmt.Sprintf("%x", sha256.Sum256(content))
		change(m)
	})
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

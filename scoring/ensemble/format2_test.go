package ensemble

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const tiny2 = "../testdata/tiny-2"

func copyTiny2(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(tiny2)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// class returns a class of a manifest.
func (m manifest) class(i int) map[string]any { return m["classes"].([]any)[i].(map[string]any) }

// remove takes a field out of a manifest.
func (m manifest) remove(path string) {
	object, name := m.at(path)
	delete(object, name)
}

// TestFormat2Refuses changes every field that format 2 adds, one by one: out of each bound, of another kind, missing.
func TestFormat2Refuses(t *testing.T) {
	type change func(m manifest)
	set := func(path string, value any) change { return func(m manifest) { m.set(path, value) } }
	remove := func(path string) change { return func(m manifest) { m.remove(path) } }
	class := func(i int, name string, value any) change {
		return func(m manifest) { m.class(i)[name] = value }
	}
	data := func(name string, value any) change {
		return func(m manifest) { m.class(2)["data"].(map[string]any)[name] = value }
	}
	for _, c := range []struct {
		change change
		want   string // in the error
	}{
		{remove("posterior"), "field posterior is missing"},
		{set("posterior", 1), "posterior is 1, must be 0 or 2 to 64"},
		{set("posterior", 65), "posterior is 65, must be 0 or 2 to 64"},
		{set("posterior", -2), "posterior is -2, must be 0 or 2 to 64"},
		{set("posterior", 0), `profile.class_gap.tables is "posterior", the ensemble has no such tables`},
		{set("posterior", 4), `tensor "posterior" has shape [3 5 8]`},
		{set("posterior", nil), "field posterior is null"},

		{func(m manifest) { delete(m.class(1), "draws") }, "field classes.1.draws is missing"},
		{class(1, "draws", -1), "classes[1].draws is -1"},
		{class(1, "draws", nil), "field classes.1.draws is null"},
		{class(1, "class_gap", 0), "classes[1].class_gap is 0, must be positive"},
		{class(1, "class_gap", -0.5), "classes[1].class_gap is -0.5, must be positive"},
		{class(1, "label", nil), "field classes.1.label is null"},
		{class(1, "images", []any{1, nil, 1}), "field classes.1.images.1 is null"},
		{class(1, "color", "red"), "field classes.1.color is unknown"},
		{data("images", -1), "classes[2].data.images is -1"},
		{data("distinct", 101), "classes[2].data.distinct is 101, must be 0 to 100"},
		{data("distinct", -1), "classes[2].data.distinct is -1"},
		{data("n_eff", 100.5), "classes[2].data.n_eff is 100.5"},
		{data("n_eff", -1), "classes[2].data.n_eff is -1"},
		{data("near_duplicates", 101), "classes[2].data.near_duplicates is 101"},
		{data("near_duplicate_groups", 51), "classes[2].data.near_duplicate_groups is 51, must be 0 to 50"},
		{data("neighbor_label_share", 1.1), "classes[2].data.neighbor_label_share is 1.1, must be 0 to 1"},
		{data("neighbor_label_share", -0.1), "classes[2].data.neighbor_label_share is -0.1"},
		{data("likely_mislabeled", 101), "classes[2].data.likely_mislabeled is 101"},
		{data("outliers", -1), "classes[2].data.outliers is -1"},
		{data("outliers", nil), "field classes.2.data.outliers is null"},
		{func(m manifest) { delete(m.class(2)["data"].(map[string]any), "n_eff") }, "field classes.2.data.n_eff is missing"},

		{set("profile.steps", 3), "field profile.steps is unknown"},
		{remove("profile.class_gap.tables"), "field profile.class_gap.tables is missing"},
		{remove("profile.request_risk.steps"), "field profile.request_risk.steps is missing"},
		{remove("profile.image_risk.guidance"), "field profile.image_risk.guidance is missing"},
		{set("profile.class_gap.tables", "producer"), "profile.class_gap.tables"},
		{set("profile.request_risk.tables", "reference"), "profile.request_risk.tables"},
		{set("profile.image_risk.tables", "members"), "profile.image_risk.tables"},
		{set("profile.class_gap.steps", 0), "profile.class_gap.steps is 0, must be 1 to 1000"},
		{set("profile.request_risk.steps", 1001), "profile.request_risk.steps is 1001, must be 1 to 1000"},
		{set("profile.image_risk.steps", 1000), "profile.image_risk.steps is 1000: leading spacing"},
		{set("profile.class_gap.guidance", "free"), "profile.class_gap.guidance"},
		{set("profile.image_risk.guidance", "shared"), "profile.image_risk.guidance"},
		{set("profile.class_gap.branch_step", 1), "profile.class_gap.branch_step is 1, must be 0 with shared guidance"},
		{set("profile.image_risk.branch_step", 1), "profile.image_risk.branch_step is 1, must be 0"},
		{set("profile.request_risk.rollout_steps", 4), "profile.request_risk.rollout_steps is 4, must be 1 to 3"},
		{set("profile.image_risk.rollout_steps", 5), "profile.image_risk.rollout_steps is 5, must be 1 to 4"},
		{set("profile.class_gap.estimator", "judge"), "profile.class_gap.estimator"},
		{set("profile.image_risk.estimator", "paide-w2"), "profile.image_risk.estimator"},
		{set("profile.image_risk", nil), "field profile.image_risk is null"},

		{remove("judge"), "files.judge is given without judge"},
		{remove("files.judge"), "judge is given without files.judge"},
		{func(m manifest) { m.remove("judge"); m.remove("files.judge") }, "image_risk.estimator is \"judge\""},
		{set("files.judge.path", "../judge.onnx"), "files.judge.path"},
		{set("files.judge.path", "unet.onnx"), "named twice"},
		{set("files.judge.sha256", strings.Repeat("0", 64)), "judge.onnx has SHA-256"},
		{set("files.judge.size", 5), "judge.onnx has 2756 bytes, the manifest says 5"},
		{set("judge.input", ""), "judge.input"},
		{set("judge.input", "pixels"), `judge.onnx: graph has no input "pixels"`},
		{set("judge.output", "votes"), `judge.onnx: graph has no output "votes"`},
		{set("judge.channels", 3), "judge.channels is 3, must be 1 as of the image"},
		{set("judge.height", 0), "judge.height is 0"},
		{set("judge.width", 8193), "judge.width is 8193"},
		{set("judge.height", 13), `judge.onnx: input "image" has shape [-1 1 12 12], must be [-1 1 13 12]`},
		{set("judge.range", []any{1, -1}), "judge.range is [1 -1]"},
		{set("judge.range", []any{0, 0}), "judge.range is [0 0]"},
		{set("judge.range", []any{0, 1, 2}), "range"},
		{set("judge.range", []any{0}), "range"},
		{set("judge.range", []any{nil, 1}), "field judge.range.0 is null"},
		{set("judge.resize", "bicubic"), "judge.resize"},
		{set("judge.resize", "none"), `judge.resize is "none", but the judge takes 12 x 12`},
		{set("judge.outputs", []any{0}), "judge.outputs has 1 numbers"},
		{set("judge.outputs", []any{0, 2, -2, 3, 3}), "judge.outputs[2] is -2, must be -1 to 3"},
		{set("judge.outputs", []any{0, 4, -1, 3, 3}), "judge.outputs[1] is 4, must be -1 to 3"},
		{set("judge.outputs", []any{0, 2, -1, 3}), `judge.onnx: output "logits" has shape [-1 5], must be [-1 4]`},
		{set("judge.outputs", []any{0, 2, nil, 3, 3}), "field judge.outputs.2 is null"},
		{set("judge.accuracy", []any{0.9, nil, 0.5}), "judge.accuracy has 3 numbers, must have one for each of the 4"},
		{set("judge.accuracy", []any{1.1, nil, 0.5, 0.9}), "judge.accuracy[0] is 1.1, must be 0 to 1"},
		{set("judge.accuracy", []any{0.9, 0.9, 0.5, 0.9}), "judge.accuracy[1] is 0.9, but no output stands for the class"},
		{set("judge.held_out", []any{0, 0, 100, 100}), "judge.accuracy[0] is 0.9, but held_out[0] is 0"},
		{set("judge.held_out", []any{100, -1, 100, 100}), "judge.held_out[1] is -1"},
		{set("judge.held_out", []any{100}), "judge.held_out has 1 numbers"},
		{set("judge.least_accuracy", 1.5), "judge.least_accuracy is 1.5, must be 0 to 1"},
		{set("judge.measured", ""), "judge.measured has 0 characters"},
		{remove("judge.measured"), "field judge.measured is missing"},
		{set("judge.threshold", 1), "field judge.threshold is unknown"},
		{set("opset", 16), "is 17, the manifest says 16"},

		{set("reference.image_gap", map[string]any{"n": 1, "mean": 0, "quantiles": map[string]any{}}), "reference"},
		{func(m manifest) { m.remove("profile.image_risk") }, "reference is \"image_risk\""},
	} {
		dir := copyTiny2(t)
		m := readManifest(t, dir)
		c.change(m)
		m.write(t, dir)
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v does not say %q", err, c.want)
		}
	}
}

// What format 2 adds is unknown in format 1.
func TestFormat1DoesNotKnowFormat2(t *testing.T) {
	for path, value := range map[string]any{
		"posterior": 0, "judge": map[string]any{}, "files.judge": map[string]any{}, "profile.image_risk": map[string]any{},
		"profile.class_gap.tables": "members", "profile.class_gap.steps": 10, "profile.request_risk.guidance": "own",
	} {
		dir := copyTiny(t)
		m := readManifest(t, dir)
		m.set(path, value)
		m.write(t, dir)
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "field "+path+" is unknown") {
			t.Errorf("%s: error is %v", path, err)
		}
	}
	for name, value := range map[string]any{"draws": 1, "class_gap": 0.5, "data": nil} {
		dir := copyTiny(t)
		m := readManifest(t, dir)
		m.class(0)[name] = value
		m.write(t, dir)
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "field classes.0."+name+" is unknown") {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

// tensors writes a safetensors file of float32 tensors, each of one value.
func tensors(shapes map[string][]int, fill func(name string, i int) float32) []byte {
	header, numbers := map[string]any{}, []byte(nil)
	for name, shape := range shapes {
		from, elements := len(numbers), 1
		for _, side := range shape {
			elements *= side
		}
		for i := range elements {
			numbers = binary.LittleEndian.AppendUint32(numbers, math.Float32bits(fill(name, i)))
		}
		header[name] = map[string]any{"dtype": "F32", "shape": shape, "data_offsets": []int{from, len(numbers)}}
	}
	text, err := json.Marshal(header)
	if err != nil {
		panic(err)
	}
	return withHeader(string(text), numbers)
}

// Every set of tables must be there if it is needed, in its shape, and finite. No other is taken.
func TestFormat2Tables(t *testing.T) {
	whole := func() map[string][]int {
		return map[string][]int{"tables": {3, 5, 8}, "posterior": {3, 5, 8}, "producer": {5, 8}, "producers": {2, 5, 8},
			"reference": {5, 8}}
	}
	zero := func(string, int) float32 { return 0 }
	for _, c := range []struct {
		change func(map[string][]int)
		fill   func(name string, i int) float32
		want   string
	}{
		{func(map[string][]int) {}, zero, ""},
		{func(s map[string][]int) { delete(s, "producers"); delete(s, "reference") }, zero, ""},
		{func(s map[string][]int) { delete(s, "tables") }, zero, `tensor "tables" is missing`},
		{func(s map[string][]int) { delete(s, "posterior") }, zero, `tensor "posterior" is missing`},
		{func(s map[string][]int) { delete(s, "producer") }, zero, `tensor "producer" is missing`},
		{func(s map[string][]int) { s["producer"] = []int{1, 5, 8} }, zero, `tensor "producer" has shape [1 5 8]`},
		{func(s map[string][]int) { s["producers"] = []int{5, 8} }, zero, `tensor "producers" has shape [5 8]`},
		{func(s map[string][]int) { s["producers"] = []int{65, 5, 8} }, zero, `tensor "producers" has shape [65 5 8]`},
		{func(s map[string][]int) { s["producers"] = []int{} }, zero, `tensor "producers" has shape []`},
		{func(s map[string][]int) { s["posterior"] = []int{3, 5, 9} }, zero, `tensor "posterior" has shape [3 5 9]`},
		{func(s map[string][]int) { s["heirs"] = []int{5, 8} }, zero, `tensor "heirs" is unknown`},
		{func(map[string][]int) {}, func(name string, i int) float32 {
			if name == "producers" && i == 50 {
				return float32(math.NaN())
			}
			return 0
		}, `tensor "producers" holds NaN at row 6, element 2`},
		{func(map[string][]int) {}, func(name string, i int) float32 {
			if name == "posterior" && i == 2*40+39 { // the last number of the last table
				return 1
			}
			return 0
		}, `tensor "posterior": table 2 has another unconditional row than the producer`},
	} {
		dir := copyTiny2(t)
		m := readManifest(t, dir)
		shapes := whole()
		c.change(shapes)
		m.replace(t, dir, "tables", tensors(shapes, c.fill))
		m.write(t, dir)
		e, err := Open(dir)
		if c.want == "" {
			if err != nil {
				t.Error(err)
			} else if have := e.Tables(TablesPosterior).Count(); have != 3 {
				t.Errorf("%d posterior tables", have)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v does not say %q", err, c.want)
		}
	}
}

// The shared row is the mean of the tables' unconditional rows.
func TestSharedRow(t *testing.T) {
	e, err := Open(tiny2)
	if err != nil {
		t.Fatal(err)
	}
	members := e.Members()
	for i, have := range members.Shared() {
		sum := 0.0
		for table := range members.Count() {
			sum += float64(members.Row(table, len(e.Classes))[i])
		}
		if want := float32(sum / float64(members.Count())); have != want {
			t.Errorf("element %d is %v, want %v", i, have, want)
		}
	}
	producer, posterior := e.Tables(TablesProducer), e.Tables(TablesPosterior)
	if fmt.Sprint(posterior.Shared()) != fmt.Sprint(producer.Row(0, len(e.Classes))) {
		t.Error("the posterior's shared row is not the producer's unconditional one")
	}
	if !e.Judge.CanTell(0) || e.Judge.CanTell(1) || e.Judge.CanTell(2) || !e.Judge.CanTell(3) {
		t.Errorf("the judge tells %v", e.Judge.Accuracy)
	}
}

// Further inputs of the backbone: rows of every set, and what a manifest, a graph or a tables file may get wrong.
func TestConditioning(t *testing.T) {
	const dir = "../testdata/tiny-conditioned"
	e, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, set := range []string{TablesMembers, TablesPosterior, TablesProducer, TablesReference} {
		tables := e.Tables(set)
		if tables == nil {
			t.Fatalf("no %s", set)
		}
		more := tables.More()
		if len(more) != 2 || len(more[0].Row(0, 1)) != 6 || len(more[1].Row(0, 1)) != 1 ||
			more[0].Count() != tables.Count() {
			t.Errorf("%s: %d further inputs", set, len(more))
		}
	}
	content, err := os.ReadFile(filepath.Join(dir, "ensemble.json"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ from, to, says string }{
		"another name":         {`"name": "pooled"`, `"name": "Pooled"`, "conditioning[0].name"},
		"a name without rows":  {`"name": "pooled"`, `"name": "vector"`, `.vector" is missing`},
		"a name twice":         {`"name": "guidance"`, `"name": "pooled"`, "twice"},
		"an input twice":       {`"input": "guidance"`, `"input": "context"`, "twice"},
		"an input of no graph": {`"input": "guidance"`, `"input": "time_ids"`, `no input "time_ids"`},
		"no input":             {`"input": "guidance"`, `"input": ""`, "conditioning[1].input"},
		"another shape":        {"6\n", "7\n", `input "pooled_projections" has shape [-1 6]`},
		"an empty side":        {"6\n", "0\n", "conditioning[0].shape is [0]"},
		"another member": {`"name": "pooled"`, `"name": "pooled", "trained": true`,
			"conditioning.0.trained is unknown"},
		"format 1": {`decuwatch-ensemble/2`, `decuwatch-ensemble/1`, "unknown"},
	} {
		changed := strings.Replace(string(content), c.from, c.to, 1)
		if changed == string(content) {
			t.Fatalf("%s: nothing was replaced", name)
		}
		copied := t.TempDir()
		if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(copied, "ensemble.json"), []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(copied); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}

package ensemble

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	tiny       = "../testdata/tiny"
	tinyTokens = "../testdata/tiny-tokens"
	shipped    = "../../ensembles/fashion-mnist"
)

func TestOpenShipped(t *testing.T) {
	for _, path := range []string{
		shipped, shipped + "/rotation-1.json", shipped + "/rotation-2.json", shipped + "/rotation-3.json",
		shipped + "/rotation-4.json", tiny, tinyTokens,
	} {
		e, err := Open(path)
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		last := e.Members().Row(e.Components-1, len(e.Classes))
		if len(last) != e.Context.Size() {
			t.Errorf("%s: last embedding has %d numbers", path, len(last))
		}
		if i, ok := e.ClassIndex(e.Classes[1].Label); !ok || i != 1 {
			t.Errorf("%s: class %q has index %d, %v", path, e.Classes[1].Label, i, ok)
		}
		if _, ok := e.ClassIndex("no such class"); ok {
			t.Errorf("%s: a class that is not there was found", path)
		}
		if len(e.WellSampled()) == 0 {
			t.Errorf("%s: no well-sampled class", path)
		}
		content, err := e.ReadFile(e.Files.Decoder)
		if err != nil || int64(len(content)) != e.Files.Decoder.Size {
			t.Errorf("%s: decoder: %d bytes, %v", path, len(content), err)
		}
	}
}

// copyTiny copies the tiny ensemble to a new directory.
func copyTiny(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(tiny)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// manifest is a manifest that a test changes by path.
type manifest map[string]any

func readManifest(t *testing.T, dir string) manifest {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(dir, ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(content))
	d.UseNumber()
	var m manifest
	if err := d.Decode(&m); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m manifest) write(t *testing.T, dir string) {
	t.Helper()
	content, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ManifestName), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// at returns the object that holds the last name of a path like "files.unet.sha256", and that name.
func (m manifest) at(path string) (map[string]any, string) {
	object := map[string]any(m)
	names := strings.Split(path, ".")
	for _, name := range names[:len(names)-1] {
		object = object[name].(map[string]any)
	}
	return object, names[len(names)-1]
}

func (m manifest) set(path string, value any) {
	object, name := m.at(path)
	object[name] = value
}

// replace writes a file and puts its size and digest into the manifest, so that only its content is wrong.
func (m manifest) replace(t *testing.T, dir, part string, content []byte) {
	t.Helper()
	file, _ := m.at("files." + part + ".path")
	if err := os.WriteFile(filepath.Join(dir, file["path"].(string)), content, 0o600); err != nil {
		t.Fatal(err)
	}
	file["size"], file["sha256"] = len(content), digest(content)
}

func TestOpenRefuses(t *testing.T) {
	type change func(t *testing.T, dir string, m manifest)
	set := func(path string, value any) change {
		return func(_ *testing.T, _ string, m manifest) { m.set(path, value) }
	}
	tables := func(shape []int, fill float32, name string) change {
		return func(t *testing.T, dir string, m manifest) {
			m.replace(t, dir, "tables", safetensors(name, shape, fill))
		}
	}
	for _, c := range []struct {
		name   string
		change change
		want   string // in the error
	}{
		{"format", set("format", "decuwatch-ensemble/3"), `format is "decuwatch-ensemble/3"`},
		{"unknown field", set("colour", "red"), "field colour is unknown"},
		{"unknown nested field", set("latent.depth", 1), "field latent.depth is unknown"},
		{"field in another case", func(_ *testing.T, _ string, m manifest) {
			m["Opset"] = m["opset"]
			delete(m, "opset")
		}, "field Opset is unknown"},
		{"missing field", func(_ *testing.T, _ string, m manifest) {
			object, name := m.at("diffusion.steps_offset")
			delete(object, name)
		}, "field diffusion.steps_offset is missing"},
		{"missing field in a list", func(_ *testing.T, _ string, m manifest) {
			delete(m["classes"].([]any)[1].(map[string]any), "label")
		}, "field classes.1.label is missing"},
		{"null in place of an object", set("latent", nil), "field latent is null"},
		{"field twice", func(t *testing.T, dir string, m manifest) {
			m.write(t, dir)
			path := filepath.Join(dir, ManifestName)
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			content = append([]byte(`{"opset":17,`), content[1:]...)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "field opset is written twice"},
		{"name", set("name", "Fashion MNIST"), "name is"},
		{"wrong digest", set("files.unet.sha256", strings.Repeat("0", 64)), "unet.onnx has SHA-256"},
		{"wrong size", set("files.decoder.size", 5), "decoder.onnx has 63239 bytes, the manifest says 5"},
		{"path out of the directory", set("files.unet.path", "../unet.onnx"), "files.unet.path"},
		{"absolute path", set("files.unet.path", "/etc/passwd"), "files.unet.path"},
		{"the same file twice", set("files.decoder.path", "unet.onnx"), "named twice"},
		{"missing file", set("files.tables.path", "other.safetensors"), "other.safetensors"},
		{"directory in place of a file", func(t *testing.T, dir string, _ manifest) {
			if err := os.Remove(filepath.Join(dir, "unet.onnx")); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(dir, "unet.onnx"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, "not a plain file"},
		{"link inside the directory", func(t *testing.T, dir string, _ manifest) {
			if err := os.Rename(filepath.Join(dir, "unet.onnx"), filepath.Join(dir, "moved.onnx")); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("moved.onnx", filepath.Join(dir, "unet.onnx")); err != nil {
				t.Fatal(err)
			}
		}, "not a plain file"},
		{"link out of the directory", func(t *testing.T, dir string, _ manifest) {
			target, err := filepath.Abs(tiny + "/unet.onnx")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(dir, "unet.onnx")); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(target, filepath.Join(dir, "unet.onnx")); err != nil {
				t.Fatal(err)
			}
		}, "not a plain file"},
		{"opset of the manifest", set("opset", 18), "unet.onnx: opset is 17, the manifest says 18"},
		{"opset out of bounds", set("opset", 12), "opset is 12"},
		{"latent shape", set("latent.height", 8), `input "latent" has shape [-1 2 4 4], must be [-1 2 8 4]`},
		{"image shape", set("image.height", 16), `output "image" has shape`},
		{"context", set("context.dim", 9), `input "context" has shape`},
		{"input name", set("graph.unet.latent", "x"), `graph has no input "x"`},
		{"input of another type", set("graph.unet.latent", "timestep"), "element type 7"},
		{"output name", set("graph.unet.output", "y"), `graph has no output "y"`},
		{"unet and decoder swapped", func(_ *testing.T, _ string, m manifest) {
			files := m["files"].(map[string]any)
			files["unet"], files["decoder"] = files["decoder"], files["unet"]
		}, "1 inputs"},
		{"not a graph", func(t *testing.T, dir string, m manifest) {
			m.replace(t, dir, "unet", []byte("this is no protobuf"))
		}, "not an ONNX graph"},
		{"empty graph", func(t *testing.T, dir string, m manifest) {
			m.replace(t, dir, "unet", []byte{0x3a, 0x00})
		}, "no inputs or no outputs"},
		{"external data on tables", set("files.tables.external", []any{map[string]any{"path": "x", "size": 1,
			"sha256": ""}}), "files.tables.external"},
		{"components", set("components", 1), "components is 1"},
		{"images of a class", func(_ *testing.T, _ string, m manifest) {
			m["classes"].([]any)[0].(map[string]any)["images"] = []int{1}
		}, "classes[0].images has 1 numbers"},
		{"label twice", func(_ *testing.T, _ string, m manifest) {
			m["classes"].([]any)[0].(map[string]any)["label"] = "class-1"
		}, `label "class-1" is not unique`},
		{"beta", set("diffusion.beta_end", 1.5), "beta_end 1.5"},
		{"schedule", set("diffusion.beta_schedule", "sigmoid"), "diffusion.beta_schedule"},
		{"prediction", set("diffusion.prediction", "flow"), "diffusion.prediction"},
		{"spacing", set("diffusion.timestep_spacing", "karras"), "diffusion.timestep_spacing"},
		{"training steps", set("diffusion.train_timesteps", 0), "diffusion.train_timesteps is 0"},
		{"offset", set("diffusion.steps_offset", -1), "diffusion.steps_offset is -1"},
		{"offset of compvis", func(_ *testing.T, _ string, m manifest) {
			d := m["diffusion"].(map[string]any)
			d["timestep_spacing"], d["steps_offset"] = "compvis", 0
		}, "diffusion.steps_offset is 0, must be 1 with timestep_spacing compvis"},
		{"last alpha of compvis", func(_ *testing.T, _ string, m manifest) {
			d := m["diffusion"].(map[string]any)
			d["timestep_spacing"], d["set_alpha_to_one"] = "compvis", true
		}, "diffusion.set_alpha_to_one is true"},
		{"a step count that diffusers takes one step further", func(_ *testing.T, _ string, m manifest) {
			m["diffusion"].(map[string]any)["timestep_spacing"] = "trailing"
			m["profile"].(map[string]any)["steps"] = 61
		}, "profile.steps is 61: trailing spacing has timestep -1 at step 61"},
		{"a step count past the last timestep", func(_ *testing.T, _ string, m manifest) {
			m["profile"].(map[string]any)["steps"] = 1000
		}, "profile.steps is 1000: leading spacing has timestep 1000 at step 0"},
		{"more steps than were trained", func(_ *testing.T, _ string, m manifest) {
			m["diffusion"].(map[string]any)["train_timesteps"] = 9
		}, "profile.steps is 10, must be 1 to 9"},
		{"alphas that end at zero", func(_ *testing.T, _ string, m manifest) {
			d := m["diffusion"].(map[string]any)
			d["beta_end"], d["timestep_spacing"] = 0.999, "trailing"
		}, "the betas leave alphas_cumprod 0 at timestep 999"},
		{"steps", set("profile.steps", 1_000_000_000), "profile.steps is 1000000000"},
		{"guidance", set("profile.guidance_scale", -1), "profile.guidance_scale is -1"},
		{"branch step", set("profile.class_gap.branch_step", 10), "profile.class_gap.branch_step is 10"},
		{"roll-out", set("profile.request_risk.rollout_steps", 6), "profile.request_risk.rollout_steps is 6"},
		{"estimator", set("profile.request_risk.estimator", "entropy"), "profile.request_risk.estimator"},
		{"scale", set("latent.scale", 0), "latent.scale is 0"},
		{"noise", set("noise", "numpy"), "noise is"},
		{"regime", set("regime", "both"), "regime is"},
		{"number too large for its type", set("latent.shift", json.Number("1e400")), "1e400"},
		{"tables of another shape", tables([]int{3, 5, 9}, 0, "tables"), `tensor "tables" has shape [3 5 9]`},
		{"tables under another name", tables([]int{3, 5, 8}, 0, "table"), `tensor "tables" is missing`},
		{"NaN in a table", tables([]int{3, 5, 8}, float32(math.NaN()), "tables"), `tensor "tables" holds NaN`},
		{"infinity in a table", tables([]int{3, 5, 8}, float32(math.Inf(1)), "tables"), `tensor "tables" holds +Inf`},
		{"tables cut short", func(t *testing.T, dir string, m manifest) {
			content := safetensors("tables", []int{3, 5, 8}, 0)
			m.replace(t, dir, "tables", content[:len(content)-4])
		}, "do not hold shape"},
		{"tables with a tail", func(t *testing.T, dir string, m manifest) {
			m.replace(t, dir, "tables", append(safetensors("tables", []int{3, 5, 8}, 0), 1, 2, 3, 4))
		}, "belong to no tensor"},
		{"a tensor twice", func(t *testing.T, dir string, m manifest) {
			m.replace(t, dir, "tables", withHeader(`{"tables":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},`+
				`"tables":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}`, make([]byte, 8)))
		}, "duplicate"},
		{"a tensor with three offsets", func(t *testing.T, dir string, m manifest) {
			m.replace(t, dir, "tables", withHeader(`{"tables":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}`,
				make([]byte, 4)))
		}, "data_offsets"},
		{"tables with a huge header", func(t *testing.T, dir string, m manifest) {
			m.replace(t, dir, "tables", []byte{255, 255, 255, 255, 255, 255, 255, 127, 1})
		}, "safetensors header"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := copyTiny(t)
			m := readManifest(t, dir)
			c.change(t, dir, m)
			if c.name != "field twice" {
				m.write(t, dir)
			}
			_, err := Open(dir)
			if err == nil {
				t.Fatal("was opened")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q does not say %q", err, c.want)
			}
		})
	}
}

// safetensors writes a file with one float32 tensor of one value.
func safetensors(name string, shape []int, fill float32) []byte {
	elements := 1
	for _, side := range shape {
		elements *= side
	}
	sides := strings.ReplaceAll(strings.Trim(fmt.Sprint(shape), "[]"), " ", ",")
	header := fmt.Sprintf(`{"%s":{"dtype":"F32","shape":[%s],"data_offsets":[0,%d]}}`, name, sides, 4*elements)
	var numbers []byte
	for range elements {
		numbers = binary.LittleEndian.AppendUint32(numbers, math.Float32bits(fill))
	}
	return withHeader(header, numbers)
}

// withHeader returns a safetensors file.
func withHeader(header string, numbers []byte) []byte {
	content := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(content, header...), numbers...)
}

// External data that the graph refers to must be named by the manifest.
func TestExternalDataMustBeNamed(t *testing.T) {
	// ModelProto{graph{initializer{external_data{location: other.bin}}}}
	entry := append([]byte{0x0a, 8}, "location"...)
	entry = append(append(entry, 0x12, 9), "other.bin"...)
	tensor := append([]byte{0x6a, byte(len(entry))}, entry...)
	node := append([]byte{0x2a, byte(len(tensor))}, tensor...)
	model := append([]byte{0x3a, byte(len(node))}, node...)
	content, err := os.ReadFile(tiny + "/unet.onnx")
	if err != nil {
		t.Fatal(err)
	}
	dir := copyTiny(t)
	m := readManifest(t, dir)
	// Protobuf merges a repeated message: this adds an initializer to the graph.
	m.replace(t, dir, "unet", append(slices.Clone(content), model...))
	m.write(t, dir)
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), `external data "other.bin" is not named`) {
		t.Errorf("error is %v", err)
	}
}

func FuzzParseGraph(f *testing.F) {
	content, err := os.ReadFile(tiny + "/decoder.onnx")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content[:2000])
	f.Add([]byte{0x3a, 0x02, 0x5a, 0x00})
	f.Fuzz(func(_ *testing.T, content []byte) { _, _ = parseGraph(content) })
}

func FuzzParseSafetensors(f *testing.F) {
	f.Add(safetensors("tables", []int{2, 3}, 1))
	f.Add([]byte{2, 0, 0, 0, 0, 0, 0, 0, '{', '}'})
	f.Fuzz(func(_ *testing.T, content []byte) { _, _ = parseSafetensors(content) })
}

// The settings key of a profile gives the profile, and nothing else does.
func TestParseSettings(t *testing.T) {
	plain := Profile{GuidanceScale: 2.5, Eta: 0.25, ClassGap: Measure{TablesMembers, 20, GuidanceOwn, 0, 1, PaiDEW2},
		RequestRisk: Measure{TablesMembers, 20, GuidanceOwn, 10, 10, PixelPaiDEW2}}
	full := Profile{GuidanceScale: 1e-7, ClassGap: Measure{TablesPosterior, 3, GuidanceShared, 0, 1, PaiDEKL},
		RequestRisk: Measure{TablesMembers, 4, GuidanceOwn, 1, 2, MeanW2},
		ImageRisk:   Measure{TablesProducer, 4, GuidanceOwn, 0, 3, EstimatorJudge}}
	gapless := full
	gapless.ImageRisk = Measure{}
	later, fuller := plain, full
	later.Start, fuller.Start = 3, 12
	for _, p := range []Profile{plain, full, gapless, later, fuller} {
		if have, err := ParseSettings(p.Settings()); err != nil || have != p {
			t.Errorf("%s gives %+v: %v", p.Settings(), have, err)
		}
	}
	for _, key := range []string{
		"", "ddim", "fixed", plain.Settings() + " ", strings.Replace(plain.Settings(), "g=2.5", "g=x", 1),
		strings.Replace(plain.Settings(), "g=2.5", "g=2.50", 1), strings.Replace(full.Settings(), "@0+1", "@0", 1),
		strings.Replace(full.Settings(), "+2/4", "+2/99999999999999999999", 1), full.Settings() + " image_risk=judge@0+3",
	} {
		if p, err := ParseSettings(key); err == nil || !strings.Contains(err.Error(), strconv.Quote(key)) {
			t.Errorf("%q gives %+v: %v", key, p, err)
		}
	}
}

func TestWithSampler(t *testing.T) {
	p := Profile{GuidanceScale: 2,
		ClassGap:    Measure{TablesMembers, 20, GuidanceOwn, 0, 1, PaiDEW2},
		RequestRisk: Measure{TablesMembers, 20, GuidanceOwn, 10, 10, MeanW2}}
	d := Diffusion{
		TrainTimesteps: 1000, BetaSchedule: "linear", BetaStart: 0.0001, BetaEnd: 0.02, Prediction: "epsilon", StepsOffset: 1,
	}
	for _, d.TimestepSpacing = range []string{"leading", "compvis"} {
		for steps := 1; steps <= 60; steps++ {
			taken := steps
			if d.TimestepSpacing == "compvis" { // range(0, 1000, 1000 // steps)
				taken = 999/(1000/steps) + 1
				if 999%(1000/steps) == 0 {
					continue // refused: ends at timestep 1000
				}
			}
			q := p.WithSampler(d, steps, 5, 0.5)
			if err := q.Validate(&Manifest{Diffusion: d}); err != nil {
				t.Errorf("%s, %d steps: %v", d.TimestepSpacing, steps, err)
			}
			if q.ClassGap.place() != p.ClassGap.place() || q.RequestRisk.BranchStep+q.RequestRisk.RolloutSteps != taken {
				t.Errorf("%s, %d steps: %+v", d.TimestepSpacing, steps, q)
			}
		}
	}
	if q := p.WithSampler(d, 50, 2, 0); q.RequestRisk.BranchStep != 25 {
		t.Errorf("branch step %d of 50, want 25", q.RequestRisk.BranchStep)
	}
	if have, want := p.Settings(), "ddim s=20 g=2 eta=0 class_gap=paide-w2@0+1 request_risk=mean-w2@10+10"; have != want {
		t.Errorf("settings %q, want %q", have, want)
	}
}

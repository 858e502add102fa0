package ensemble

import (
	"os"
	"strings"
	"testing"
)

const tinyFlow = "../testdata/tiny-flow"

// An ensemble of flow matching has the fields of its kind and no others, and its backbone takes timesteps that need not
// be whole. Its settings name the sampler.
func TestFlowManifest(t *testing.T) {
	e, err := Open(tinyFlow)
	if err != nil {
		t.Fatal(err)
	}
	key := e.Profile.Settings()
	if e.Diffusion.Sampler() != "flow_match" || e.Diffusion.Shift != 3 || !strings.HasPrefix(key, "flow_match g=2 ") {
		t.Errorf("diffusion %+v, settings %s", e.Diffusion, key)
	}
	if p, err := ParseSettings(key); err != nil || p != e.Profile.Bare() {
		t.Errorf("settings %s give %+v: %v", key, p, err)
	}
	type change func(m manifest)
	set := func(path string, value any) change { return func(m manifest) { m.set(path, value) } }
	remove := func(path string) change { return func(m manifest) { m.remove(path) } }
	for _, c := range []struct {
		change change
		want   string // in the error
	}{
		{set("diffusion.kind", "flow"), `kind is "flow", must be one of ddim, flow_match`},
		{set("diffusion.kind", 1), "kind"},
		{set("diffusion.kind", nil), "field diffusion.kind is null"},
		{set("diffusion.kind", "ddim"), "field diffusion.beta_schedule is missing"},
		{remove("diffusion.kind"), "field diffusion.beta_schedule is missing"},
		{set("format", Format1), "is unknown"},
		{remove("diffusion.shift"), "field diffusion.shift is missing"},
		{remove("diffusion.image_seq_len"), "field diffusion.image_seq_len is missing"},
		{set("diffusion.invert_sigmas", true), "field diffusion.invert_sigmas is unknown"},
		{set("diffusion.use_karras_sigmas", false), "field diffusion.use_karras_sigmas is unknown"},
		{set("diffusion.beta_start", 0.1), "field diffusion.beta_start is unknown"},
		{set("diffusion.shift", 0), "diffusion.shift is 0"},
		{set("diffusion.shift_terminal", nil), "field diffusion.shift_terminal is null"},
		{set("diffusion.prediction", "epsilon"), `diffusion.prediction is "epsilon", must be one of velocity`},
		{set("profile.eta", 0.5), "eta is 0.5, must be 0 with kind flow_match"},
		{set("profile.request_risk.steps", 1001), "profile.request_risk.steps is 1001"},
	} {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(tinyFlow)); err != nil {
			t.Fatal(err)
		}
		m := readManifest(t, dir)
		c.change(m)
		m.write(t, dir)
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error is %v, want %s", err, c.want)
		}
	}
}

// A backbone whose timesteps are of the wrong type for its kind is refused by the name of the input.
func TestFlowTimestepType(t *testing.T) {
	for from, to := range map[string]string{tinyFlow: tiny2, tiny2: tinyFlow} {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
			t.Fatal(err)
		}
		m := readManifest(t, dir)
		content, err := os.ReadFile(to + "/unet.onnx")
		if err != nil {
			t.Fatal(err)
		}
		m.replace(t, dir, "unet", content)
		m.write(t, dir)
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), `"timestep" has element type`) {
			t.Errorf("the backbone of %s in %s: %v", to, from, err)
		}
	}
}

package helm

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	appsv1 "k8s.io/api/apps/v1"
)

func loadChart(t *testing.T) *chart.Chart {
	t.Helper()
	c, err := loader.LoadDir("decuwatch")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// at returns values in which the dotted path has a value.
func at(path string, value any) map[string]any {
	names := strings.Split(path, ".")
	for _, name := range slices.Backward(names) {
		value = map[string]any{name: value}
	}
	return value.(map[string]any)
}

func environment(t *testing.T, objects map[string][]byte) map[string]string {
	t.Helper()
	env := map[string]string{}
	for _, e := range into[appsv1.Deployment](t, objects, "Deployment").Spec.Template.Spec.Containers[0].Env {
		if _, twice := env[e.Name]; twice {
			t.Errorf("%s is there twice", e.Name)
		}
		env[e.Name] = e.Value
	}
	return env
}

// TestSettingsRenderAsText sweeps kinds of scalars; a setting that the chart sets too is there once, with the setting's
// value.
func TestSettingsRenderAsText(t *testing.T) {
	c := loadChart(t)
	for _, s := range []struct {
		value any
		want  string
	}{
		{8388608, "8388608"}, {"8388608", "8388608"}, {85899345920, "85899345920"}, {0, "0"}, {-1, "-1"},
		{1e6, "1000000"}, {1e14, "100000000000000"}, {0.01, "0.01"}, {2.5, "2.5"}, {1e-7, "1e-07"},
		{true, "true"}, {false, "false"}, {"", ""}, {"20s", "20s"}, {"true", "true"}, {"1e6", "1e6"}, {"0x10", "0x10"},
		{"null", "null"}, {"a: b #c", "a: b #c"}, {`"quoted" \ $HOME`, `"quoted" \ $HOME`},
		{"{{ .Values }}", "{{ .Values }}"},
		{"line\nbreak", "line\nbreak"}, {" space ", " space "},
	} {
		env := environment(t, renderChart(t, c, at("settings.DECUWATCH_STREAM_MAX_BYTES", s.value)))
		if got := env["DECUWATCH_STREAM_MAX_BYTES"]; got != s.want {
			t.Errorf("%#v renders as %q, want %q", s.value, got, s.want)
		}
	}
	for name, value := range map[string]string{"DECUWATCH_SCORING_DEVICE": "cuda:1",
		"DECUWATCH_NATS_URL": "tls://other:4222", "DECUWATCH_SCORING_ENSEMBLES": "/ensembles/a,/ensembles/b"} {
		values := map[string]any{"settings": map[string]any{name: value}}
		if name == "DECUWATCH_SCORING_DEVICE" {
			values["gpu"], values["image"] = map[string]any{"enabled": true}, map[string]any{"tag": "cuda"}
		}
		if got := environment(t, renderChart(t, c, values))[name]; got != value {
			t.Errorf("%s renders as %q, want the setting's %q", name, got, value)
		}
	}
	objects := renderChart(t, c, map[string]any{"keda": map[string]any{"enabled": true},
		"settings": map[string]any{"DECUWATCH_STREAM_NAME": "OTHER"}})
	if !strings.Contains(string(objects["ScaledObject"]), `"stream":"OTHER"`) {
		t.Errorf("KEDA watches another stream than the workers: %s", objects["ScaledObject"])
	}
}

// TestEveryNumberRendersAsAnInteger gives each number of values.yaml a size that a float prints with an exponent.
func TestEveryNumberRendersAsAnInteger(t *testing.T) {
	c := loadChart(t)
	paths := 0
	var walk func(prefix string, values map[string]any)
	walk = func(prefix string, values map[string]any) {
		for _, name := range slices.Sorted(maps.Keys(values)) {
			switch v := values[name].(type) {
			case map[string]any:
				walk(prefix+name+".", v)
			case float64, int64, json.Number:
				paths++
				path, n := prefix+name, 8388608
				if strings.HasSuffix(path, "Port") {
					n = 65535
				}
				values := at(path, n)
				for group, value := range map[string]any{"keda": true, "gpu": true} {
					if _, ok := values[group]; !ok {
						values[group] = map[string]any{}
					}
					values[group].(map[string]any)["enabled"] = value
				}
				values["image"] = map[string]any{"tag": "cuda"}
				if path == "keda.minReplicas" {
					values["keda"].(map[string]any)["maxReplicas"] = n
				}
				if path == "replicas" {
					delete(values, "keda")
				}
				objects := renderChart(t, c, values)
				all := bytes.Join(slices.Collect(maps.Values(objects)), nil)
				if !bytes.Contains(all, []byte(fmt.Sprint(n))) || bytes.Contains(all, []byte("e+")) {
					t.Errorf("%s: %d does not render as an integer", path, n)
				}
			}
		}
	}
	walk("", c.Values)
	if paths < 10 {
		t.Errorf("only %d numbers", paths)
	}
}

// TestWrongValuesAreRefused sweeps values that are wrong by themselves or contradict each other; the error names the
// value.
func TestWrongValuesAreRefused(t *testing.T) {
	c := loadChart(t)
	gpu := map[string]any{"enabled": true}
	for name, s := range map[string]struct {
		values map[string]any
		want   string
	}{
		"unknown value":            {map[string]any{"replica": 3}, "replica"},
		"unknown value in a group": {at("image.tags", "cpu"), "tags"},
		"unknown setting":          {at("settings.DECUWATCH_CONSUMER_MAX_ROWS", 1), "DECUWATCH_CONSUMER_MAX_ROWS"},
		"setting in lower case":    {at("settings.decuwatch_nats_url", "x"), "decuwatch_nats_url"},
		"list as a setting": {at("settings.DECUWATCH_SCORING_ENSEMBLES", []any{"/a"}),
			"DECUWATCH_SCORING_ENSEMBLES"},
		"empty tag":              {at("image.tag", ""), "tag"},
		"tag with a digest":      {at("image.tag", "cpu@sha256:abc"), "tag"},
		"tag that is a number":   {at("image.tag", 1.2), "tag"},
		"empty repository":       {at("image.repository", ""), "repository"},
		"digest that is cut":     {at("image.digest", "sha256:abc"), "digest"},
		"gpu with the cpu image": {map[string]any{"gpu": gpu}, "image.tag"},
		"gpu with a cpu image": {map[string]any{"gpu": gpu, "image": map[string]any{"tag": "1.2-cpu"}},
			"image.tag"},
		"gpu without a device": {map[string]any{"gpu": gpu, "image": map[string]any{"tag": "cuda"},
			"settings": map[string]any{"DECUWATCH_SCORING_DEVICE": "cpu"}}, "gpu.enabled"},
		"device without a gpu": {at("settings.DECUWATCH_SCORING_DEVICE", "cuda:0"), "gpu.enabled"},
		"more least than most": {map[string]any{"keda": map[string]any{"enabled": true, "minReplicas": 9,
			"maxReplicas": 8}}, "keda.minReplicas"},
		"no replicas at most": {at("keda.maxReplicas", 0), "maxReplicas"},
		"half a replica":      {at("replicas", 1.5), "replicas"},
		"negative replicas":   {at("replicas", -1), "replicas"},
		"replicas as text":    {at("replicas", "2"), "replicas"},
		"short grace":         {at("terminationGracePeriodSeconds", 20), "terminationGracePeriodSeconds"},
		"grace of a longer drain": {at("settings.DECUWATCH_CONSUMERS_DRAIN_TIMEOUT", "1m30s"),
			"terminationGracePeriodSeconds is 40"},
		"drain that is no duration": {at("settings.DECUWATCH_CONSUMERS_DRAIN_TIMEOUT", "long"),
			"DECUWATCH_CONSUMERS_DRAIN_TIMEOUT"},
		"drain that is a number": {at("settings.DECUWATCH_CONSUMERS_DRAIN_TIMEOUT", 20),
			"DECUWATCH_CONSUMERS_DRAIN_TIMEOUT"},
		"secret as a setting": {at("settings.DECUWATCH_POSTGRES_URL", "postgres://u:p@h/d"),
			"postgres.urlSecret"},
		"nkey as a setting": {at("settings.DECUWATCH_NATS_NKEY", "/x"), "nats.nkeySecret"},
		"port of the probes": {at("settings.DECUWATCH_METRICS_ADDRESS", "0.0.0.0:1"),
			"DECUWATCH_METRICS_ADDRESS"},
		"TLS for the probes":       {at("settings.DECUWATCH_METRICS_TLS_CERT", "/x"), "DECUWATCH_METRICS_TLS_CERT"},
		"review by a setting":      {at("settings.DECUWATCH_REVIEW_ADDRESS", "0.0.0.0:1"), "review.enabled"},
		"no ensembles":             {at("ensembles.paths", []any{}), "paths"},
		"relative ensemble":        {at("ensembles.paths", []any{"ensembles/a"}), "paths"},
		"ensemble with a comma":    {at("ensembles.paths", []any{"/a,b"}), "paths"},
		"address without a scheme": {at("nats.url", "nats:4222"), "url"},
		"page without a scheme":    {at("review.url", "review.example.com"), "url"},
		"model that is no name":    {at("keda.model", "Fashion MNIST"), "model"},
		"port out of range":        {at("networkPolicy.natsPort", 70000), "natsPort"},
		"enabled as text":          {at("gpu.enabled", "true"), "enabled"},
		"GPU as a limit":           {at("resources.limits", map[string]any{"nvidia.com/gpu": 1}), "gpu.count"},
		"pull policy":              {at("image.pullPolicy", "Sometimes"), "pullPolicy"},
		"empty secret":             {at("postgres.urlSecret.name", ""), "name"},
	} {
		if _, err := tryChart(c, s.values); err == nil || !strings.Contains(err.Error(), s.want) {
			t.Errorf("%s: %v, want an error that says %q", name, err, s.want)
		}
	}
	digest := "sha256:" + strings.Repeat("a", 64)
	d := into[appsv1.Deployment](t, renderChart(t, c, at("image.digest", digest)), "Deployment")
	if image := d.Spec.Template.Spec.Containers[0].Image; image != "decuwatch@"+digest {
		t.Errorf("image %s", image)
	}
}

// TestNullsRenderOrAreNamed takes every value away, as null does in Helm: the chart renders without it, or names it.
func TestNullsRenderOrAreNamed(t *testing.T) {
	c := loadChart(t)
	var sweep func(path string, values map[string]any)
	sweep = func(path string, values map[string]any) {
		for _, name := range slices.Sorted(maps.Keys(values)) {
			_, err := tryChart(c, at(path+name, nil))
			if err != nil && (strings.Contains(err.Error(), "template") || !strings.Contains(err.Error(), name)) {
				t.Errorf("%s: null: %v", path+name, err)
			}
			if group, ok := values[name].(map[string]any); ok {
				sweep(path+name+".", group)
			}
		}
	}
	sweep("", c.Values)
}

// TestResourcesOfAnyShapeTakeTheGPU renders quantities that are left out; the GPU joins what is left.
func TestResourcesOfAnyShapeTakeTheGPU(t *testing.T) {
	c := loadChart(t)
	for name, resources := range map[string]any{
		"defaults":  map[string]any{},
		"no limits": map[string]any{"limits": map[string]any{"memory": nil}},
		"nothing": map[string]any{"limits": map[string]any{"memory": nil}, "requests": map[string]any{"memory": nil,
			"cpu": nil}},
		"numbers": map[string]any{"limits": map[string]any{"memory": 4294967296, "cpu": 2}},
		"null":    map[string]any{"limits": nil, "requests": nil},
	} {
		for _, gpu := range []bool{false, true} {
			d := into[appsv1.Deployment](t, renderChart(t, c, map[string]any{"resources": resources,
				"gpu": map[string]any{"enabled": gpu, "count": 2}, "image": map[string]any{"tag": "cuda"}}), "Deployment")
			got := d.Spec.Template.Spec.Containers[0].Resources
			limit, request := got.Limits["nvidia.com/gpu"], got.Requests["nvidia.com/gpu"]
			if want := map[bool]int64{true: 2}[gpu]; limit.Value() != want || request.Value() != want {
				t.Errorf("%s: %s and %s GPUs, want %d", name, &limit, &request, want)
			}
			if cpu := got.Limits.Cpu(); name != "numbers" && !cpu.IsZero() {
				t.Errorf("%s: the limits have a CPU, %s", name, cpu)
			}
		}
	}
}

var update = flag.Bool("update", false, "write the settings into decuwatch/values.schema.json")

// TestSettingsAreKnown holds the settings that values.schema.json names against the program's.
func TestSettingsAreKnown(t *testing.T) {
	const path = "decuwatch/values.schema.json"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const indent = "\n          "
	names := strings.Join(slices.Sorted(maps.Keys(settings(t))), `",`+indent+`"`)
	names = `"propertyNames": {` + indent[:9] + `"enum": [` + indent + `"` + names + `"` + indent[:9] + `]`
	want := regexp.MustCompile(`"propertyNames": \{\s*"enum": \[[^]]*\]`).ReplaceAllLiteral(text, []byte(names))
	if *update {
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if !*update && !bytes.Equal(text, want) {
		t.Errorf("%s does not name the program's settings: go test -run SettingsAreKnown -update", path)
	}
}

// TestTheProgramAcceptsWhatIsRendered runs the program itself with what the chart renders. It must come as far as to
// miss the
// ensembles, past its settings; with a wrong setting it must not.
func TestTheProgramAcceptsWhatIsRendered(t *testing.T) {
	program := filepath.Join(t.TempDir(), "decuwatch")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./cmd/decuwatch")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := loadChart(t)
	start := func(values map[string]any) (int, string) {
		t.Helper()
		serve := exec.CommandContext(t.Context(), program, "serve")
		serve.Env = []string{"DECUWATCH_POSTGRES_URL=postgres://u:p@postgres:5432/decuwatch?sslmode=disable"}
		for name, value := range environment(t, renderChart(t, c, values)) {
			if name == "DECUWATCH_METRICS_ADDRESS" {
				value = "127.0.0.1:0" // the port may be taken here
			}
			if name != "DECUWATCH_POSTGRES_URL" {
				serve.Env = append(serve.Env, name+"="+value)
			}
		}
		out, err := serve.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatalf("%v: %s", err, out)
		}
		return exit.ExitCode(), string(out)
	}
	all := maps.Clone(variants)
	all["settings of every kind"] = at("settings", map[string]any{
		"DECUWATCH_CONSUMERS_MAX_ROWS": 8388608, "DECUWATCH_STREAM_MAX_BYTES": 85899345920,
		"DECUWATCH_REVIEW_SHARE": 0.5, "DECUWATCH_SCORING_SPINNING": true, "DECUWATCH_CONSUMERS_ACK_WAIT": "45s",
		"DECUWATCH_TRACING_SAMPLE_RATIO": 1, "DECUWATCH_SCORING_ENSEMBLES": "/ensembles/a,/ensembles/b",
	})
	all["handshake first"] = at("nats.tlsHandshakeFirst", true)
	for name, values := range all {
		if code, out := start(values); code != 1 || !strings.Contains(out, "/ensembles/") {
			t.Errorf("%s: exit code %d: %s", name, code, out)
		}
	}
	if code, out := start(at("settings.DECUWATCH_CONSUMERS_MAX_ROWS", 0.5)); code != 2 || !strings.Contains(out,
		"DECUWATCH_CONSUMERS_MAX_ROWS") {
		t.Errorf("a wrong setting: exit code %d: %s", code, out)
	}
}

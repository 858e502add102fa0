// Package helm checks the chart against Kubernetes's own types and KEDA's schema. It is a module of its own because the
// program must not depend on Kubernetes's libraries.
package helm

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"
)

// keda is the version whose schema ScaledObjects are checked against; the module proxy has it.
const keda = "github.com/kedacore/keda/v2@v2.21.0"

// render renders the chart and returns its objects as JSON: those of workers by kind, others by kind/component.
func render(t *testing.T, values map[string]any) map[string][]byte {
	t.Helper()
	c, err := loader.LoadDir("decuwatch")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	return renderChart(t, c, values)
}

func renderChart(t *testing.T, c *chart.Chart, values map[string]any) map[string][]byte {
	t.Helper()
	objects, err := tryChart(c, values)
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// tryChart renders the chart with values as they come out of a values file: numbers are floats.
func tryChart(c *chart.Chart, values map[string]any) (map[string][]byte, error) {
	text, err := json.Marshal(values)
	if err != nil {
		return nil, err
	}
	var read map[string]any
	if err := json.Unmarshal(text, &read); err != nil {
		return nil, err
	}
	all, err := chartutil.ToRenderValues(c, read, chartutil.ReleaseOptions{Name: "monitor", Namespace: "decuwatch",
		IsInstall: true}, chartutil.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	files, err := (engine.Engine{Strict: true}).Render(c, all)
	if err != nil {
		return nil, err
	}
	objects := map[string][]byte{}
	for name, text := range files {
		if strings.TrimSpace(text) == "" || strings.HasSuffix(name, ".tpl") {
			continue
		}
		object, err := yaml.YAMLToJSONStrict([]byte(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w\n%s", name, err, text)
		}
		var meta struct {
			Kind     string
			Metadata struct{ Labels map[string]string }
		}
		err = json.Unmarshal(object, &meta)
		key := meta.Kind
		if component := meta.Metadata.Labels["app.kubernetes.io/component"]; component != "worker" {
			key += "/" + component
		}
		if err != nil || meta.Kind == "" || objects[key] != nil {
			return nil, fmt.Errorf("%s: %s, %w", name, key, err)
		}
		objects[key] = object
	}
	return objects, nil
}

// into decodes an object; a field that the type does not have is an error.
func into[T any](t *testing.T, objects map[string][]byte, kind string) T {
	t.Helper()
	var object T
	if objects[kind] == nil {
		t.Fatalf("no %s", kind)
	}
	if err := yaml.UnmarshalStrict(objects[kind], &object); err != nil {
		t.Fatalf("%s: %v", kind, err)
	}
	return object
}

// settings returns the environment variables that the program reads, from the reference that is made of its
// configuration.
func settings(t *testing.T) map[string]bool {
	t.Helper()
	content, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, m := range regexp.MustCompile("\\(`(DECUWATCH_\\w+)`,").FindAllStringSubmatch(string(content), -1) {
		known[m[1]] = true
	}
	return known
}

var variants = map[string]map[string]any{
	"defaults": {},
	"gpu": {
		"gpu": map[string]any{"enabled": true, "runtimeClassName": "nvidia"}, "image": map[string]any{"tag": "cuda"},
		"tolerations":  []any{map[string]any{"key": "nvidia.com/gpu", "operator": "Exists"}},
		"nodeSelector": map[string]any{"accelerator": "h200"},
	},
	"everything": {
		"keda": map[string]any{"enabled": true},
		"nats": map[string]any{"caSecret": map[string]any{"name": "nats-ca"}},
		"networkPolicy": map[string]any{"extraEgress": []any{map[string]any{"ports": []any{map[string]any{"port": 443,
			"protocol": "TCP"}}}}},
		"review":     map[string]any{"enabled": true, "url": "https://review.example.com"},
		"canary":     map[string]any{"enabled": true},
		"monitoring": map[string]any{"enabled": true, "labels": map[string]any{"release": "prometheus"}},
		"image":      map[string]any{"pullSecrets": []any{map[string]any{"name": "registry"}}},
		"affinity": map[string]any{"podAntiAffinity": map[string]any{
			"preferredDuringSchedulingIgnoredDuringExecution": []any{},
		}},
		"podAnnotations": map[string]any{"prometheus.io/scrape": "true"},
	},
	"least": {
		"migration": map[string]any{"enabled": false}, "networkPolicy": map[string]any{"enabled": false},
		"podDisruptionBudget": map[string]any{"enabled": false},
	},
}

// TestChart renders the chart with several values; each object has the fields of its type and no others, selectors
// match, secrets come by reference, and each setting is one that the program reads.
func TestChart(t *testing.T) {
	known := settings(t)
	for name, values := range variants {
		t.Run(name, func(t *testing.T) {
			objects := render(t, values)
			d := into[appsv1.Deployment](t, objects, "Deployment")
			into[corev1.ServiceAccount](t, objects, "ServiceAccount")
			pods := []corev1.PodSpec{d.Spec.Template.Spec}
			podLabels := d.Spec.Template.Labels
			matches := func(kind string, selector map[string]string) {
				if len(selector) == 0 {
					t.Errorf("%s selects everything", kind)
				}
				for k, v := range selector {
					if podLabels[k] != v {
						t.Errorf("%s selects %s=%s, the pods have %q", kind, k, v, podLabels[k])
					}
				}
			}
			matches("Deployment", d.Spec.Selector.MatchLabels)
			wanted := 2
			if name != "least" {
				wanted += 4
				job := into[batchv1.Job](t, objects, "Job/migration")
				pods = append(pods, job.Spec.Template.Spec)
				if job.Annotations["helm.sh/hook"] != "pre-install,pre-upgrade" ||
					job.Spec.Template.Spec.RestartPolicy != corev1.RestartPolicyNever {
					t.Errorf("migration: %v, restart %s", job.Annotations, job.Spec.Template.Spec.RestartPolicy)
				}
				selected := true
				for k, v := range d.Spec.Selector.MatchLabels {
					selected = selected && job.Spec.Template.Labels[k] == v
				}
				if selected {
					t.Error("the Deployment selects the migration's pod")
				}
				budget := into[policyv1.PodDisruptionBudget](t, objects, "PodDisruptionBudget")
				matches("PodDisruptionBudget", budget.Spec.Selector.MatchLabels)
				policy := into[networkingv1.NetworkPolicy](t, objects, "NetworkPolicy")
				matches("NetworkPolicy", policy.Spec.PodSelector.MatchLabels)
				if len(policy.Spec.PolicyTypes) != 2 || len(policy.Spec.Ingress) == 0 || len(policy.Spec.Ingress[0].From) == 0 {
					t.Errorf("network policy: %+v", policy.Spec)
				}
				checkMigrationPolicy(t, objects, job)
			}
			if name == "everything" {
				wanted += 6
				canary := into[appsv1.Deployment](t, objects, "Deployment/canary")
				pods = append(pods, canary.Spec.Template.Spec)
				checkMonitoring(t, objects, d, canary)
				service := into[corev1.Service](t, objects, "Service")
				matches("Service", service.Spec.Selector)
				checkScaledObject(t, objects["ScaledObject"], d)
			} else if d.Spec.Replicas == nil || *d.Spec.Replicas != 2 {
				t.Errorf("replicas: %v", d.Spec.Replicas)
			}
			if len(objects) != wanted {
				t.Errorf("%d objects, want %d", len(objects), wanted)
			}
			for _, pod := range pods {
				checkPod(t, pod, known)
			}
			if name == "gpu" {
				c := d.Spec.Template.Spec.Containers[0]
				if gpus := c.Resources.Limits["nvidia.com/gpu"]; gpus.Value() != 1 ||
					value(c, "DECUWATCH_SCORING_DEVICE") != "cuda:0" || c.Image != "decuwatch:cuda" {
					t.Errorf("gpu: %v, %s", c.Resources.Limits, c.Image)
				}
			}
		})
	}
}

// checkMigrationPolicy wants the migration's pod to be selected by a policy that exists before it.
func checkMigrationPolicy(t *testing.T, objects map[string][]byte, job batchv1.Job) {
	t.Helper()
	policy := into[networkingv1.NetworkPolicy](t, objects, "NetworkPolicy/migration")
	selector := labels.SelectorFromSet(policy.Spec.PodSelector.MatchLabels)
	if selector.Empty() || !selector.Matches(labels.Set(job.Spec.Template.Labels)) {
		t.Errorf("the policy selects %s, the migration's pod has %v", selector, job.Spec.Template.Labels)
	}
	weight := func(annotations map[string]string) int {
		n, _ := strconv.Atoi(annotations["helm.sh/hook-weight"])
		return n
	}
	if policy.Annotations["helm.sh/hook"] != job.Annotations["helm.sh/hook"] ||
		weight(policy.Annotations) >= weight(job.Annotations) ||
		strings.Contains(policy.Annotations["helm.sh/hook-delete-policy"], "hook-succeeded") {
		t.Errorf("the policy is the hook %v, the migration %v", policy.Annotations, job.Annotations)
	}
	if len(policy.Spec.Ingress) > 0 || len(policy.Spec.Egress) == 0 {
		t.Errorf("the policy of the migration: %+v", policy.Spec)
	}
}

// checkMonitoring holds PodMonitors and the PrometheusRule against the pods and the rules in deploy/prometheus.
func checkMonitoring(t *testing.T, objects map[string][]byte, workers, canary appsv1.Deployment) {
	t.Helper()
	for kind, d := range map[string]appsv1.Deployment{"PodMonitor": workers, "PodMonitor/canary": canary} {
		monitor := into[podMonitor](t, objects, kind)
		if monitor.Metadata.Labels["release"] != "prometheus" {
			t.Errorf("%s: labels %v", kind, monitor.Metadata.Labels)
		}
		pod := d.Spec.Template
		if s := labels.SelectorFromSet(monitor.Spec.Selector.MatchLabels); s.Empty() || !s.Matches(labels.Set(pod.Labels)) {
			t.Errorf("%s selects %s, the pods have %v", kind, s, pod.Labels)
		}
		endpoints := monitor.Spec.PodMetricsEndpoints
		if len(endpoints) != 1 || endpoints[0].Port != pod.Spec.Containers[0].Ports[0].Name {
			t.Fatalf("%s: endpoints %+v", kind, endpoints)
		}
		// The job as the Prometheus operator names it.
		job := pod.Labels[monitor.Spec.JobLabel]
		for _, r := range endpoints[0].Relabelings {
			if r.TargetLabel == "job" {
				job = r.Replacement
			}
		}
		rules, err := os.ReadFile("../prometheus/alerts.yml")
		if err != nil {
			t.Fatal(err)
		}
		if job == "" || !strings.Contains(string(rules), `up{job="`+job+`"}`) {
			t.Errorf("%s: the job is %q, which no rule knows", kind, job)
		}
	}
	rule := into[struct {
		Kind, APIVersion string
		Metadata         metadata
		Spec             struct{ Groups []any }
	}](t, objects, "PrometheusRule")
	var want []any
	for _, name := range []string{"recording", "alerts"} {
		content, err := os.ReadFile("../prometheus/" + name + ".yml")
		if err != nil {
			t.Fatal(err)
		}
		var file struct{ Groups []any }
		if err := yaml.Unmarshal(content, &file); err != nil {
			t.Fatal(err)
		}
		want = append(want, file.Groups...)
	}
	if !reflect.DeepEqual(rule.Spec.Groups, want) {
		t.Error("the PrometheusRule is not what deploy/prometheus has")
	}
}

type metadata struct {
	Name   string
	Labels map[string]string
}

// podMonitor has the fields of the Prometheus operator's PodMonitor that the chart uses.
type podMonitor struct {
	Kind, APIVersion string
	Metadata         metadata
	Spec             struct {
		JobLabel            string
		Selector            struct{ MatchLabels map[string]string }
		PodMetricsEndpoints []struct {
			Port, Interval string
			Relabelings    []struct{ TargetLabel, Replacement string }
		}
	}
}

func value(c corev1.Container, variable string) string {
	for _, e := range c.Env {
		if e.Name == variable {
			return e.Value
		}
	}
	return ""
}

func checkPod(t *testing.T, pod corev1.PodSpec, known map[string]bool) {
	t.Helper()
	if pod.SecurityContext == nil || pod.SecurityContext.RunAsNonRoot == nil || !*pod.SecurityContext.RunAsNonRoot ||
		pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Errorf("pod: %+v", pod.SecurityContext)
	}
	volumes := map[string]bool{}
	for _, v := range pod.Volumes {
		volumes[v.Name] = true
	}
	for _, c := range pod.Containers {
		s := c.SecurityContext
		if s == nil || !*s.ReadOnlyRootFilesystem || *s.AllowPrivilegeEscalation || len(s.Capabilities.Drop) != 1 {
			t.Errorf("%s: %+v", c.Name, s)
		}
		if c.Resources.Requests.Cpu().IsZero() || c.Resources.Limits.Memory().IsZero() {
			t.Errorf("%s: resources %+v", c.Name, c.Resources)
		}
		paths := map[string]bool{}
		for _, m := range c.VolumeMounts {
			if !volumes[m.Name] || !m.ReadOnly {
				t.Errorf("%s: mount %s of %d volumes", c.Name, m.Name, len(volumes))
			}
			paths[m.MountPath] = true
		}
		seen := map[string]bool{}
		for _, e := range c.Env {
			if !known[e.Name] || seen[e.Name] {
				t.Errorf("%s: %s is twice there or nothing that the program reads", c.Name, e.Name)
			}
			seen[e.Name] = true
			if strings.HasPrefix(e.Value, "/etc/") && !paths[filepath.Dir(e.Value)] {
				t.Errorf("%s: %s is %s, which is not mounted", c.Name, e.Name, e.Value)
			}
			if e.Name == "DECUWATCH_POSTGRES_URL" && (e.Value != "" || e.ValueFrom == nil || e.ValueFrom.SecretKeyRef == nil) {
				t.Errorf("%s: the address of Postgres, with its password, is not by reference", c.Name)
			}
		}
		if c.Name != "decuwatch" {
			continue
		}
		port := c.Ports[0].Name
		for _, probe := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe} {
			if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Port.StrVal != port {
				t.Errorf("probe: %+v", probe)
			}
		}
	}
}

// checkScaledObject holds a ScaledObject against the schema of KEDA's own resource definition.
func checkScaledObject(t *testing.T, object []byte, d appsv1.Deployment) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", keda).Output()
	if err != nil {
		t.Fatalf("go mod download %s: %v: %s", keda, err, out)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(module.Dir, "config/crd/bases/keda.sh_scaledobjects.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var definition struct {
		Spec struct {
			Versions []struct {
				Name   string
				Schema struct{ OpenAPIV3Schema map[string]any }
			}
		}
	}
	if err := yaml.Unmarshal(text, &definition); err != nil || len(definition.Spec.Versions) != 1 ||
		definition.Spec.Versions[0].Name != "v1alpha1" {
		t.Fatalf("KEDA's definition: %v", err)
	}
	schema := definition.Spec.Versions[0].Schema.OpenAPIV3Schema
	closed(schema)
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("keda.json", schema); err != nil {
		t.Fatal(err)
	}
	compiled, err := compiler.Compile("keda.json")
	if err != nil {
		t.Fatal(err)
	}
	check := func(object []byte) error {
		var v any
		if err := json.Unmarshal(object, &v); err != nil {
			return err
		}
		return compiled.Validate(v)
	}
	if err := check(object); err != nil {
		t.Error(err)
	}
	if check([]byte(strings.Replace(string(object), "maxReplicaCount", "maxReplicas", 1))) == nil {
		t.Error("the schema takes a field that there is not")
	}
	var scaled struct {
		Spec struct {
			ScaleTargetRef struct{ Name string }
			Triggers       []struct {
				Type     string
				Metadata map[string]string
			}
		}
	}
	if err := json.Unmarshal(object, &scaled); err != nil {
		t.Fatal(err)
	}
	if scaled.Spec.ScaleTargetRef.Name != d.Name || d.Spec.Replicas != nil {
		t.Errorf("KEDA scales %s, and the Deployment %s sets %v replicas", scaled.Spec.ScaleTargetRef.Name, d.Name,
			d.Spec.Replicas)
	}
	if m := scaled.Spec.Triggers[0].Metadata; m["stream"] != "GENERATION" || m["consumer"] != "decuwatch-fashion-mnist" {
		t.Errorf("trigger: %v", m)
	}
}

// closed refuses fields that an object's schema does not name, as the API server's strict validation does.
func closed(schema any) {
	switch s := schema.(type) {
	case map[string]any:
		if _, ok := s["properties"].(map[string]any); ok && s["type"] == "object" && s["additionalProperties"] == nil &&
			s["x-kubernetes-preserve-unknown-fields"] == nil {
			s["additionalProperties"] = false
		}
		for _, v := range s {
			closed(v)
		}
	case []any:
		for _, v := range s {
			closed(v)
		}
	}
}

// TestWrongValues shows that the checks above fail if they should.
func TestWrongValues(t *testing.T) {
	objects := render(t, nil)
	wrong := []byte(strings.Replace(string(objects["Deployment"]), `"terminationGracePeriodSeconds"`,
		`"terminationGrace"`, 1))
	var d appsv1.Deployment
	if err := yaml.UnmarshalStrict(wrong, &d); err == nil {
		t.Error("a field that there is not was taken")
	}
}

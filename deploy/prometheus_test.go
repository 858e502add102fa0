package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

type ruleFile struct {
	Groups []struct {
		Rules []struct {
			Record, Alert, Expr string
			Labels, Annotations map[string]string
		}
	}
}

// TestPrometheusRules runs promtool's tests, and checks that each rule has a test and a runbook.
func TestPrometheusRules(t *testing.T) {
	promtool := tool(t, "promtool", "prometheus/usr/bin/promtool")
	if out, err := exec.CommandContext(t.Context(), promtool, "test", "rules", "prometheus/rules_test.yml").
		CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	var tests struct {
		Tests []struct {
			AlertRuleTest []struct {
				Alertname string
				ExpAlerts []any `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
			PromqlExprTest []struct{ Expr string } `yaml:"promql_expr_test"`
		}
	}
	readYAML(t, "prometheus/rules_test.yml", &tests)
	tested := map[string]bool{}
	for _, test := range tests.Tests {
		for _, a := range test.AlertRuleTest {
			if len(a.ExpAlerts) > 0 {
				tested[a.Alertname] = true
			}
		}
		for _, p := range test.PromqlExprTest {
			tested[strings.SplitN(p.Expr, "{", 2)[0]] = true
		}
	}
	operating, err := os.ReadFile("../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"recording", "alerts"} {
		var rules ruleFile
		readYAML(t, "prometheus/"+file+".yml", &rules)
		for _, group := range rules.Groups {
			for _, r := range group.Rules {
				if !tested[r.Record+r.Alert] {
					t.Errorf("%s%s has no test", r.Record, r.Alert)
				}
				if r.Alert == "" {
					continue
				}
				if want := "docs/operating.md#" + strings.ToLower(r.Alert); r.Annotations["runbook"] != want ||
					r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
					t.Errorf("%s: annotations %v", r.Alert, r.Annotations)
				}
				if !strings.Contains(string(operating), "\n### "+r.Alert+"\n") {
					t.Errorf("docs/operating.md has no runbook ### %s", r.Alert)
				}
				if s := r.Labels["severity"]; s != "warn" && s != "critical" {
					t.Errorf("%s: severity %q", r.Alert, s)
				}
			}
		}
	}
}

// process starts a program that is asked to end with the test; its output is shown if the test fails. It returns the
// output so far.
func process(t *testing.T, env []string, name string, args ...string) func() string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		err := cmd.Wait()
		kill.Stop()
		if err != nil {
			t.Errorf("%s: %v", filepath.Base(name), err)
		}
		if t.Failed() {
			out, _ := os.ReadFile(log.Name())
			t.Logf("%s: %s", filepath.Base(name), out[max(0, len(out)-4000):])
		}
	})
	return func() string {
		out, _ := os.ReadFile(log.Name())
		return string(out)
	}
}

// listening waits until a program has logged the address that it listens on, and returns it.
func listening(t *testing.T, output func() string, line string) string {
	t.Helper()
	pattern := regexp.MustCompile(line)
	var found []string
	eventually(t, "the address is logged",
		func() bool { found = pattern.FindStringSubmatch(output()); return found != nil })
	return found[1]
}

var program struct {
	sync.Once
	path string
	err  error
}

// decuwatch builds the program, once for all tests.
func decuwatch(t *testing.T) string {
	t.Helper()
	program.Do(func() {
		dir, err := os.MkdirTemp("", "decuwatch")
		if err != nil {
			program.err = err
			return
		}
		program.path = filepath.Join(dir, "decuwatch")
		args := []string{"build", "-o", program.path}
		if raceEnabled {
			args = append(args, "-race") // what other packages' tests have compiled already
		}
		if out, err := exec.Command("go", append(args, "../cmd/decuwatch")...).CombinedOutput(); err != nil {
			program.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if program.err != nil {
		t.Fatal(program.err)
	}
	return program.path
}

func TestMain(m *testing.M) {
	if options, ok := os.LookupEnv(workerEnv); ok {
		if err := work(options); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	code := m.Run()
	if program.path != "" {
		os.RemoveAll(filepath.Dir(program.path))
	}
	os.Exit(code)
}

// get returns the body of a page, or "" if there is none yet.
func get(ctx context.Context, address string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return ""
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return ""
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		return ""
	}
	return string(body)
}

// eventually asks until done, and fails the test if that takes too long.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after %s", what, patience)
		}
	}
}

// runMonitor runs the program itself against the shipped NATS configuration as its worker user, with the variables that
// docker-compose.yml sets, and publishes events to it as the producer. It returns the addresses of its metrics, and of
// those of its canaries.
func runMonitor(t *testing.T, events int) (monitor, canaries string) {
	t.Helper()
	dir := secrets(t)
	s := startNATS(t, dir)
	database := pgtest.URL(t)
	watchdog := process(t, []string{
		"DECUWATCH_NATS_URL=" + s.ClientURL(),
		"DECUWATCH_NATS_NKEY=" + filepath.Join(dir, "nats-canary.nk"),
		"DECUWATCH_NATS_INBOX_PREFIX=_INBOX_canary",
		"DECUWATCH_STREAM_MAX_BYTES=1048576",
		"DECUWATCH_ALERTS_MAX_BYTES=1048576",
		"DECUWATCH_POSTGRES_URL=" + database,
		"DECUWATCH_SCORING_ENSEMBLES=" + tiny,
	}, decuwatch(t), "canary", "--every=24h", "--listen=127.0.0.1:0")
	canaries = listening(t, watchdog, `metrics=http://([0-9.:]+)/metrics`)
	output := process(t, []string{
		"DECUWATCH_NATS_URL=" + s.ClientURL(),
		"DECUWATCH_NATS_NKEY=" + filepath.Join(dir, "nats-worker.nk"),
		"DECUWATCH_NATS_INBOX_PREFIX=_INBOX_worker",
		"DECUWATCH_STREAM_MAX_BYTES=1048576",
		"DECUWATCH_ALERTS_MAX_BYTES=1048576",
		"DECUWATCH_POSTGRES_URL=" + database,
		"DECUWATCH_SCORING_ENSEMBLES=../scoring/testdata/tiny",
		"DECUWATCH_METRICS_ADDRESS=127.0.0.1:0",
		"DECUWATCH_REVIEW_ADDRESS=127.0.0.1:0",
	}, decuwatch(t), "serve")
	metrics := listening(t, output, `metrics=http://([0-9.:]+)/metrics`)
	eventually(t, "the monitor is ready", func() bool { return get(t.Context(), "http://"+metrics+"/readyz") != "" })
	producer, _ := as(t, s, dir, "producer")
	js, err := jetstream.New(producer)
	if err != nil {
		t.Fatal(err)
	}
	model := modelName(t, "../scoring/testdata/tiny/ensemble.json")
	for i := range events {
		event := schema.Event{Source: "//shop/images", ID: strconv.Itoa(i), Time: time.Now().UTC(),
			Data: schema.Generation{Model: model, Class: schema.ClassIndex(0), Seed: uint64(i)}}
		var err error
		eventually(t, "an event is stored",
			func() bool { _, err = schema.Publish(t.Context(), js, event); return err == nil })
	}
	scored := regexp.MustCompile(`(?m)^decuwatch_events_total\{[^}]*outcome="score"[^}]*\} (\d+)$`)
	eventually(t, "all events are scored", func() bool {
		found := scored.FindStringSubmatch(get(t.Context(), "http://"+metrics+"/metrics"))
		n := 0
		if found != nil {
			n, _ = strconv.Atoi(found[1])
		}
		return n >= events // a canary may be among them
	})
	// The command line, each verb as the user that it is for.
	verb := func(user string, args ...string) {
		cmd := exec.CommandContext(t.Context(), decuwatch(t), args...)
		cmd.Env = append(os.Environ(), "DECUWATCH_NATS_URL="+s.ClientURL(),
			"DECUWATCH_NATS_NKEY="+filepath.Join(dir, "nats-"+user+".nk"),
			"DECUWATCH_NATS_INBOX_PREFIX=_INBOX_"+user, "DECUWATCH_POSTGRES_URL="+database)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("decuwatch %s, as %s: %v: %s", strings.Join(args, " "), user, err, out)
		}
	}
	verb("producer", "publish", "--model", model, "--class", "0", "--seed", "99")
	verb("subscriber", "watch", "--all", "--no-follow")
	verb("operator", "reconcile")
	return metrics, canaries
}

func modelName(t *testing.T, manifest string) string {
	t.Helper()
	content, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	var m struct{ Name string }
	if err := json.Unmarshal(content, &m); err != nil {
		t.Fatal(err)
	}
	return m.Name
}

var metricName = regexp.MustCompile(`\bdecuwatch_\w+`)

// TestPrometheus has a real Prometheus, with the shipped configuration, scrape a running monitor: every metric that a
// dashboard or a rule names exists, every panel gets series, every rule evaluates.
func TestPrometheus(t *testing.T) {
	prometheus := tool(t, "prometheus", "prometheus/usr/bin/prometheus")
	metrics, canaries := runMonitor(t, 5)
	// The health check of docker-compose.yml finds the monitor ready, and fails if there is none.
	for address, healthy := range map[string]bool{metrics: true, "127.0.0.1:1": false} {
		check := compose(t, "cpu").Services["decuwatch-cpu"].HealthCheck.Test
		host, port, _ := strings.Cut(address, ":")
		command := strings.Replace(check[len(check)-1], "127.0.0.1/9464", host+"/"+port, 1)
		if out, err := exec.CommandContext(t.Context(), "bash", "-c", command).CombinedOutput(); (err == nil) != healthy {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	config, err := os.ReadFile("prometheus/prometheus.yml")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := filepath.Abs("prometheus")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	text := string(config)
	for _, pair := range [][2]string{
		{"dns_sd_configs:\n      - {names: [decuwatch], type: A, port: 9464, refresh_interval: 15s}",
			"static_configs:\n      - targets: [\"" + metrics + "\"]"},
		{"15s", "300ms"}, {"/etc/prometheus/rules/*.yml", filepath.Join(dir, "rules", "*.yml")},
	} {
		old, new := pair[0], pair[1]
		if !strings.Contains(text, old) {
			t.Fatalf("prometheus.yml has no %s", old)
		}
		text = strings.ReplaceAll(text, old, new)
	}
	// As docker-compose.yml mounts them.
	if err := os.Mkdir(filepath.Join(dir, "rules"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"recording.yml", "alerts.yml"} {
		if err := os.Symlink(filepath.Join(rules, name), filepath.Join(dir, "rules", name)); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	listen := listening(t,
		process(t, nil, prometheus, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"),
			"--web.listen-address=127.0.0.1:0", "--web.console.libraries="+dir, "--web.console.templates="+dir),
		`msg="Listening on" address=([0-9.:]+)`)
	query := func(expr string) (series int, failure string) {
		var answer struct {
			Status, Error string
			Data          struct{ Result []any }
		}
		body := get(t.Context(), "http://"+listen+"/api/v1/query?query="+url.QueryEscape(expr))
		if err := json.Unmarshal([]byte(body), &answer); err != nil {
			return 0, err.Error()
		}
		if answer.Status != "success" {
			return 0, answer.Status + " " + answer.Error
		}
		return len(answer.Data.Result), ""
	}
	eventually(t, "Prometheus has scraped",
		func() bool { n, _ := query("count_over_time(decuwatch_build_info[1m]) > 3"); return n > 0 })

	exposed := get(t.Context(), "http://"+metrics+"/metrics") + get(t.Context(), "http://"+canaries+"/metrics")
	// The health check of the canaries in docker-compose.yml.
	if get(t.Context(), "http://"+canaries+"/healthz") == "" {
		t.Error("the canaries are not healthy")
	}
	exists := func(where, expr string) {
		for _, name := range metricName.FindAllString(expr, -1) {
			if _, recorded, _ := strings.Cut(expr, name+":"); recorded != "" {
				continue // a recording rule's name, evaluated below
			}
			if !regexp.MustCompile(`(?m)^` + name + `[{ ]`).MatchString(exposed) {
				t.Errorf("%s: the monitor has no metric %s", where, name)
			}
		}
	}
	// Panels without a series here: the ensemble of this test says no closed form.
	empty := map[string]bool{"Class gap over its closed form": true, "Rows against the budget": true,
		"Deferred events expire in": true}
	n := 0
	for name, b := range boards(t) {
		for _, p := range b.Panels {
			for _, target := range p.Targets {
				if target.Expr == "" {
					continue
				}
				n++
				where := name + ": " + p.Title
				exists(where, target.Expr)
				expr := strings.NewReplacer("$model", ".*", "$__rate_interval", "1m").Replace(target.Expr)
				var series int
				var failure string
				wait := patience
				if empty[p.Title] {
					wait = time.Second
				}
				for end := time.Now().Add(wait); series == 0 && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
					series, failure = query(expr)
				}
				if series == 0 && !(empty[p.Title] && failure == "") {
					t.Errorf("%s: no series: %s %s", where, expr, failure)
				}
			}
		}
	}
	if n < 20 {
		t.Errorf("%d PromQL queries", n)
	}
	for _, name := range []string{"recording", "alerts"} {
		var file ruleFile
		readYAML(t, "prometheus/"+name+".yml", &file)
		for _, group := range file.Groups {
			for _, r := range group.Rules {
				exists(r.Record+r.Alert, r.Expr)
			}
		}
	}
	var evaluated struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError, State string }
			}
		}
	}
	eventually(t, "every rule is evaluated", func() bool {
		if json.Unmarshal([]byte(get(t.Context(), "http://"+listen+"/api/v1/rules")), &evaluated) != nil {
			return false
		}
		count := 0
		for _, group := range evaluated.Data.Groups {
			for _, r := range group.Rules {
				if r.Health == "unknown" {
					return false
				}
				count++
			}
		}
		return count >= 20
	})
	for _, group := range evaluated.Data.Groups {
		for _, r := range group.Rules {
			if r.Health != "ok" || r.State == "firing" {
				t.Errorf("%s: %s %s %s", r.Name, r.Health, r.State, r.LastError)
			}
		}
	}
}

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"github.com/nats-io/nats-server/v2/server"
	"golang.org/x/sync/errgroup"

	"github.com/decuwatch/decuwatch/internal/app"
)

// wrongTexts are values that each setting of text or a list must refuse. "" marks settings that take any text, such
// as names of files, which are read later.
var wrongTexts = map[string][]string{
	"nats.url":                   {"127.0.0.1:4222", "http://127.0.0.1:4222", "nats://", "nats://a:4222,b"},
	"nats.creds":                 {""},
	"nats.nkey":                  {""},
	"nats.ca":                    {""},
	"nats.cert":                  {"/cert.pem"},
	"nats.key":                   {"/key.pem"},
	"nats.inbox-prefix":          {"a.*", "a.>", "a b", "a."},
	"stream.name":                {"a b", "a.b", "*", "a/b"},
	"scoring.ensembles":          {""},
	"scoring.shadows":            {""},
	"scoring.library":            {""},
	"scoring.device":             {"gpu", "cuda", "cuda:", "cuda:-1", "CPU", "cpu:0"},
	"scoring.profile":            {"loose", "Fixed"},
	"scoring.cascade":            {"", "0.2", "0.2,2", "0,0.5", "on"},
	"scoring.unreproducible":     {"drop"},
	"sampling.rules":             {"[{share: 2}]", "[{class: Bag}]", "share"},
	"sampling.salt":              {""},
	"budget.rules":               {"[{rows-per-hour: 5}]", "[{policy: skip}]", "budget"},
	"postgres.url":               {"http://127.0.0.1/x", "postgres://a:b:c", "postgres://127.0.0.1/x?sslmode=maybe"},
	"alerts.stream":              {"a b", "a.b", ">"},
	"alerts.webhook-url":         {"example.com/hook", "ftp://example.com", "https://"},
	"alerts.webhook-secret-file": {"/secret"},
	"alerts.webhook-format":      {"xml", "Slack"},
	"alerts.alertmanager-url":    {"alertmanager:9093", "http://"},
	"alerts.link":                {"review/"},
	"rescore.stream":             {"a b", "a.b", "*", "a/b"},
	"review.address":             {"8080", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:65536", "off"},
	"review.token-file":          {""},
	"review.trusted-header":      {"X User", "X-User:", "é"},
	"review.trusted-proxies":     {"10.0.0.0/33", "proxy", "10.0.0.0/8"},
	"review.tls-cert":            {"/cert.pem"},
	"review.tls-key":             {"/key.pem"},
	"review.url":                 {"review.example.com", "ftp://x"},
	"metrics.address":            {"9464", "127.0.0.1", "127.0.0.1:-1", "127.0.0.1:65536"},
	"metrics.tls-cert":           {"/cert.pem"},
	"metrics.tls-key":            {"/key.pem"},
	"tracing.endpoint":           {"collector:4318", "grpc://collector"},
	"log.level":                  {"loud", "info "},
	"log.format":                 {"xml", "JSON"},
}

// wrongValues are values that every setting of a kind must refuse.
var wrongValues = map[string][]string{
	"integer":       {"x", "1.5", "1e3", "-1", "9223372036854775808", "1,000"},
	"duration":      {"soon", "5", "-1s", "1d", "9999999h"},
	"number":        {"x", "NaN", "Inf", "-Inf", "-0.1", "1e400"},
	"true or false": {"maybe", "2"},
}

// Every setting in the reference is a flag of serve, under the same name.
func TestServeReadsEverySetting(t *testing.T) {
	var c cli
	parser, err := kong.New(&c, names)
	if err != nil {
		t.Fatal(err)
	}
	flags := map[string]bool{}
	for _, command := range parser.Model.Leaves(true) {
		if command.Name != "serve" {
			continue
		}
		for _, group := range command.AllFlags(true) {
			for _, f := range group {
				flags[f.Name] = true
			}
		}
	}
	for _, f := range app.Settings() {
		if !flags[f.Name] {
			t.Errorf("serve has no flag --%s", f.Name)
		}
		delete(flags, f.Name)
	}
	for name := range flags {
		if strings.Contains(name, ".") {
			t.Errorf("--%s is not in the reference", name)
		}
	}
}

// TestWrongValuesOfEverySetting gives serve a wrong value of each setting, in the file, in the environment and by a
// flag. serve must end with the exit code for wrong settings, and name the setting and the place of the value.
func TestWrongValuesOfEverySetting(t *testing.T) {
	var cases atomic.Int64
	var settings errgroup.Group
	settings.SetLimit(runtime.GOMAXPROCS(0))
	for _, f := range app.Settings() {
		settings.Go(func() error {
			cases.Add(int64(wrongValuesOf(t, f)))
			return nil
		})
	}
	_ = settings.Wait() // each reports its own errors
	t.Logf("%d cases", cases.Load())
}

// wrongValuesOf gives serve each wrong value of a setting, in each place, and returns how many that were.
func wrongValuesOf(t *testing.T, f app.Setting) (cases int) {
	t.Helper()
	values := append(slices.Clone(wrongValues[f.Kind]), wrongTexts[f.Name]...)
	if len(values) == 0 {
		t.Errorf("%s has no wrong value here", f.Name)
	}
	group, name, _ := strings.Cut(f.Name, ".")
	path := filepath.Join(t.TempDir(), "settings.yaml")
	for _, value := range values {
		if value == "" {
			continue
		}
		if err := os.WriteFile(path, fmt.Appendf(nil, "# settings\n%s:\n  %s: %q\n", group, name, value),
			0o600); err != nil {
			t.Error(err)
			return cases
		}
		for place, run := range map[string]struct {
			args []string
			env  map[string]string
			want string
		}{
			"file":        {args: []string{"--config", path}, want: "settings.yaml:3"},
			"environment": {env: map[string]string{f.Variable: value}, want: f.Variable},
			"flag":        {args: []string{"--" + f.Name + "=" + value}},
		} {
			cases++
			args := append([]string{"serve", "--scoring.ensembles=/nowhere"}, run.args...)
			code, text := serveWith(t, args, run.env)
			if code != exitUsage || !strings.Contains(text, f.Name) || !strings.Contains(text, run.want) {
				t.Errorf("%s: %s %q: exit code %d, %q", place, f.Name, value, code, text)
			}
			if strings.Count(strings.TrimSpace(text), "\n") > 1 { // the second line names the help
				t.Errorf("%s: %s %q: the error has several lines: %q", place, f.Name, value, text)
			}
		}
	}
	return cases
}

func serveWith(t *testing.T, args []string, env map[string]string) (int, string) {
	t.Helper()
	var out, err bytes.Buffer
	code := run(t.Context(), args, func(name string) string { return env[name] }, strings.NewReader(""), &out, &err)
	return code, err.String()
}

// TestSettingsThatDoNotFitTogether gives serve settings that contradict each other. It must name them.
func TestSettingsThatDoNotFitTogether(t *testing.T) {
	for _, c := range []struct{ file, want string }{
		{"review: {token-file: /t, trusted-header: X-User}", "review.token-file and review.trusted-header"},
		{"review: {trusted-proxies: [10.0.0.0/8]}", "review.trusted-proxies"},
		{"nats: {creds: /c, nkey: /n}", "nats.creds and nats.nkey"},
		{"stream: {max-age: 9600h}\nretention: {events: 9599h}", "retention.events"},
		{"consumers: {retry-delay: 2m}", "consumers.retry-max-delay"},
		{"alerts: {webhook-secret-file: /s}", "alerts.webhook-secret-file"},
		{"review: {workers: 1, workers: 2}", "settings.yaml:1: review.workers is given twice"},
		{"review: {workers: 1}\nreview: {share: 0.5}", "settings.yaml:2: review is given twice"},
		{"review: {workers: 1}\n---\nreview: {workers: 2}", "a second document"},
	} {
		path := filepath.Join(t.TempDir(), "settings.yaml")
		if err := os.WriteFile(path, []byte(c.file), 0o600); err != nil {
			t.Fatal(err)
		}
		if code, text := serveWith(t, []string{"serve", "--scoring.ensembles=/nowhere", "--config", path},
			nil); code != exitUsage || !strings.Contains(text, c.want) {
			t.Errorf("%s: exit code %d, %q", c.file, code, text)
		}
	}
}

// TestEveryVerbValidatesItsSettings gives each verb a wrong value of each group of settings that it reads.
func TestEveryVerbValidatesItsSettings(t *testing.T) {
	for _, args := range [][]string{
		{"watch", "--nats.url=x"}, {"watch", "--alerts.stream=a b"}, {"publish", "--stream.name=a b", "--model=m",
			"--class=1", "--seed=1"},
		{"canary", "-e=/e", "--nats.url=x"}, {"canary", "-e=/e", "--stream.replicas=0"}, {"canary", "-e=/e",
			"--postgres.url=x://"}, {"reconcile", "--stream.name=a b"}, {"reconcile", "--alerts.replicas=9"},
		{"migrate", "--postgres.max-conns=0"}, {"review", "list", "--postgres.batch-size=0"}, {"thresholds", "list",
			"--postgres.lock-timeout=0s"},
		{"replay", "a", "-e=/e", "--scoring.profile=x"}, {"score", "--class=1", "--seed=1", "-e=/e",
			"--scoring.device=x"},
	} {
		setting := ""
		for _, a := range args {
			if strings.Contains(a, ".") {
				setting, _, _ = strings.Cut(strings.TrimPrefix(a, "--"), "=")
			}
		}
		if code, text := serveWith(t, args, nil); code != exitUsage || !strings.Contains(text, setting) {
			t.Errorf("%q: exit code %d, %q", args, code, text)
		}
	}
}

func TestVariablesThatAreNoSettingsAreReported(t *testing.T) {
	got := app.UnknownVariables([]string{
		"DECUWATCH_CONSUMERS_MAX_ROWS=1", "DECUWATCH_CONSUMERS_MAXROWS=1", "DECUWATCH_NATS_TLS=true",
		"DECUWATCH_CONFIG=/x", "DECUWATCH_TRAIN=1", "PATH=/bin",
		"DECUWATCH_REVIEW_SERVICE_HOST=10.0.0.1", "DECUWATCH_REVIEW_SERVICE_PORT_HTTP=80",
		"DECUWATCH_REVIEW_PORT=tcp://10.0.0.1:80", "DECUWATCH_REVIEW_PORT_80_TCP_ADDR=10.0.0.1",
		"DECUWATCH_ONNXRUNTIME_LIB=/lib.so",
	})
	if want := []string{"DECUWATCH_CONSUMERS_MAXROWS", "DECUWATCH_NATS_TLS"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	for _, f := range app.Settings() {
		if got := app.UnknownVariables([]string{f.Variable + "=x"}); len(got) > 0 {
			t.Errorf("%s is reported", got)
		}
	}
}

// TestEmptyVariablesAreReported gives every setting an empty variable.
func TestEmptyVariablesAreReported(t *testing.T) {
	var environment, want []string
	for _, f := range app.Settings() {
		environment, want = append(environment, f.Variable+"="), append(want, f.Variable)
	}
	environment = append(environment, "PATH=", "DECUWATCH_NOTHING=")
	if got := app.EmptyVariables(environment); len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := app.EmptyVariables([]string{"DECUWATCH_REVIEW_ADDRESS=none"}); len(got) > 0 {
		t.Errorf("%v is empty", got)
	}
}

// TestPublishNamesTheSettingsOfAFullServer publishes to a server that has no room for the stream.
func TestPublishNamesTheSettingsOfAFullServer(t *testing.T) {
	o := server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, StoreDir: t.TempDir(), NoLog: true, NoSigs: true,
		JetStream: true, JetStreamMaxStore: 1 << 30}
	s, err := server.NewServer(&o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(time.Minute) {
		t.Fatal("nats-server does not start")
	}
	args := []string{"publish", "--nats.url", s.ClientURL(), "--model=m", "--class=1", "--seed=1"}
	code, text := serveWith(t, args, nil)
	if code != exitFailed || !strings.Contains(text, "stream.max-bytes") {
		t.Errorf("exit code %d, %q", code, text)
	}
}

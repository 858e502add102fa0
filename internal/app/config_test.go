package app

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/alecthomas/kong"

	"github.com/decuwatch/decuwatch/internal/settings"
)

var update = flag.Bool("update", false, "write docs/configuration.md anew")

// TestConfigurationReferenceIsComplete holds help.txt against the comments of the settings' fields, and
// docs/configuration.md against both.
func TestConfigurationReferenceIsComplete(t *testing.T) {
	hold := func(path, want string) {
		t.Helper()
		if *update {
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("%s is not what the settings say: go test ./internal/app -run Reference -update", path)
		}
	}
	help = comments(t)
	hold("help.txt", help)
	const page, mark = "../../docs/configuration.md", "<!-- settings -->\n"
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, _, _ := strings.Cut(string(content), mark)
	hold(page, before+mark+reference())
	for _, f := range Settings() {
		if !strings.Contains(f.Help, "Defaults to ") && !strings.Contains(f.Help, "Required.") {
			t.Errorf("%s: the documentation does not say what it defaults to", f.Name)
		}
		if f.Group == "" {
			t.Errorf("%s has no group", f.Name)
		}
		if f.Default != "" && !strings.Contains(f.Help, "Defaults to "+f.Default) {
			t.Errorf("%s defaults to %s, its documentation says %q", f.Name, f.Default, f.Help)
		}
	}
}

// reference describes the settings in Markdown, by group.
func reference() string {
	var b strings.Builder
	group := ""
	for _, s := range Settings() {
		if s.Group != group {
			group = s.Group
			fmt.Fprintf(&b, "\n## %s\n\n", group)
		}
		width := 0
		text := fmt.Sprintf("- **`%s`** (`%s`, %s): %s", s.Name, s.Variable, s.Kind, s.Help)
		for i, word := range strings.Fields(text) {
			switch {
			case i > 0 && width+1+utf8.RuneCountInString(word) > 120:
				b.WriteString("\n  ")
				width = 2
			case i > 0:
				b.WriteString(" ")
				width++
			}
			b.WriteString(word)
			width += utf8.RuneCountInString(word)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// comments returns the name of each setting with the comment of its field, one a line.
func comments(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	config := reflect.TypeFor[Config]()
	for i := range config.NumField() {
		group := config.Field(i)
		written := map[string]string{} // by the tags of the field
		types := []reflect.Type{group.Type}
		for _, f := range reflect.VisibleFields(group.Type) {
			if f.Anonymous {
				types = append(types, f.Type)
			}
		}
		for _, owner := range types {
			maps.Copy(written, fieldComments(t, owner))
		}
		for _, f := range reflect.VisibleFields(group.Type) {
			if name := f.Tag.Get("name"); name != "" {
				fmt.Fprintf(&b, "%s%s: %s\n", group.Tag.Get("prefix"), name, written[string(f.Tag)])
			}
		}
	}
	return b.String()
}

// fieldComments returns the comments of a struct's fields by their tags.
func fieldComments(t *testing.T, owner reflect.Type) map[string]string {
	t.Helper()
	dir := filepath.Join("../..", strings.TrimPrefix(owner.PkgPath(), "github.com/decuwatch/decuwatch"))
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, path := range files {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok || spec.Name.Name != owner.Name() {
				return true
			}
			for _, f := range spec.Type.(*ast.StructType).Fields.List {
				if f.Tag != nil {
					text := f.Doc.Text() + f.Comment.Text()
					found[strings.Trim(f.Tag.Value, "`")] = strings.Join(strings.Fields(text), " ")
				}
			}
			return false
		})
	}
	return found
}

// Every group has bounds, and Config.Check, the entry of serve, asks each for them. LogConfig checks in Logger.
func TestEveryGroupIsChecked(t *testing.T) {
	config := reflect.TypeFor[Config]()
	for i := range config.NumField() {
		if g := config.Field(i); g.Name != "Log" && !g.Type.Implements(reflect.TypeFor[checker]()) {
			t.Errorf("%s has no Check", g.Name)
		}
	}
	err := Config{}.Check()
	for i := range config.NumField() {
		if g := config.Field(i); !slices.Contains([]string{"Log", "Volume", "Tracing", "Sampling"}, g.Name) &&
			!strings.Contains(err.Error(), g.Tag.Get("prefix")) {
			t.Errorf("the zero values of %s are accepted", g.Name)
		}
	}
}

// parsedConfig returns the configuration of serve that a file, an environment and arguments make.
func parsedConfig(t *testing.T, file string, env map[string]string, args ...string) (Config, error) {
	t.Helper()
	getenv := func(name string) string { return env[name] }
	var c struct {
		ConfigFile string `name:"config" short:"c"`
		Config     `embed:""`
	}
	s := &Sources{Getenv: getenv}
	parser, err := kong.New(&c, kong.Exit(func(int) { t.Fatal("exit") }), s.Option())
	if err != nil {
		t.Fatal(err)
	}
	if file != "" {
		path := filepath.Join(t.TempDir(), "decuwatch.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append([]string{"--config", path}, args...)
	}
	_, err = parser.Parse(args)
	return c.Config, err
}

func TestFlagsBeatTheEnvironmentWhichBeatsTheFile(t *testing.T) {
	const file = `
nats: {url: "nats://file:1", creds: /file}
consumers:
  ack-wait: 41s
  max-deliver: 3
scoring:
  ensembles: [a, b]
  spinning: true
postgres:
  max-conns: 11
review:
  share: 0.5
metrics:
`
	env := map[string]string{
		"DECUWATCH_NATS_URL": "nats://env:2", "DECUWATCH_CONSUMERS_ACK_WAIT": "42s",
		"DECUWATCH_ONNXRUNTIME_LIB": "/lib.so",
	}
	c, err := parsedConfig(t, file, env, "--nats.url", "nats://flag:3")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []struct {
		name      string
		got, want any
	}{
		{"flag over environment over file", c.NATS.URL, "nats://flag:3"},
		{"environment over file", c.Consumers.AckWait, 42 * time.Second},
		{"file over default", c.Consumers.MaxDeliver, 3},
		{"file", c.NATS.Creds, "/file"},
		{"list", strings.Join(c.Scoring.Ensembles, " "), "a b"},
		{"true", c.Scoring.Spinning, true},
		{"number", c.Review.Share, 0.5},
		{"default", c.Metrics.Address, "127.0.0.1:9464"},
		{"library", c.Scoring.Library, "/lib.so"},
	} {
		if !reflect.DeepEqual(v.got, v.want) {
			t.Errorf("%s: %v, want %v", v.name, v.got, v.want)
		}
	}
	c, err = parsedConfig(t, file, map[string]string{"DECUWATCH_SCORING_ENSEMBLES": "c,d,e"})
	if err != nil || len(c.Scoring.Ensembles) != 3 {
		t.Errorf("ensembles %q, error %v; want the environment's three", c.Scoring.Ensembles, err)
	}
	path := filepath.Join(t.TempDir(), "named-by-environment.yaml")
	if err := os.WriteFile(path, []byte("stream: {name: OTHER}"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err = parsedConfig(t, "", map[string]string{"DECUWATCH_CONFIG": path})
	if err != nil || c.Stream.Name != "OTHER" {
		t.Errorf("stream %q, error %v; want the stream in the file that the environment names", c.Stream.Name, err)
	}
}

func TestWrongSettingsAreNamed(t *testing.T) {
	for _, c := range []struct {
		name, file string
		env        map[string]string
		args       []string
		want       string
	}{
		{name: "unknown name", file: "nats:\n  address: x\n",
			want: "decuwatch.yaml:2: there is no setting nats.address"},
		{name: "unknown group", file: "kafka: {}\n", want: "there is no setting kafka"},
		{name: "value in place of a group", file: "nats: x\n", want: "there is no setting nats"},
		{name: "group in place of a value", file: "nats: {url: {a: b}}\n", want: "nats.url must be a plain value"},
		{name: "not YAML", file: "nats: [\n", want: "read settings"},
		{name: "kind, file", file: "consumers: {ack-wait: soon}\n", want: "consumers.ack-wait"},
		{name: "kind, environment", env: map[string]string{"DECUWATCH_POSTGRES_MAX_CONNS": "many"},
			want: "postgres.max-conns"},
		{name: "kind, flag", args: []string{"--tracing.sample-ratio", "half"}, want: "tracing.sample-ratio"},
		{name: "bound", args: []string{"--consumers.max-deliver", "0"},
			want: "consumers.max-deliver is 0, must be at least 1"},
		{name: "duration", args: []string{"--consumers.ack-wait", "1ms"},
			want: "consumers.ack-wait is 1ms, must be at least 100ms"},
		{name: "order", args: []string{"--consumers.retry-delay", "1m"},
			want: "consumers.retry-max-delay is 30s, must be at least 1m0s"},
		{name: "ledger shorter than the stream", args: []string{"--retention.events", "2h"},
			want: "retention.events is 2h0m0s, must be at least 168h0m0s"},
		{name: "share", args: []string{"--review.share", "1.5"}, want: "review.share is 1.5, must be 0 to 1"},
		{name: "profile", args: []string{"--scoring.profile", "loose"}, want: `scoring.profile is "loose"`},
		{name: "wait for latents", args: []string{"--latents.wait=1m", "--consumers.handle-timeout=1m"},
			want: "latents.wait is 1m0s, must be below 1m0s, which is consumers.handle-timeout"},
		{name: "cascade", args: []string{"--scoring.cascade", "0.2"}, want: `scoring.cascade is "0.2", must be off, profile`},
		{name: "cascade without a cut", args: []string{"--scoring.cascade", "0,0"}, want: `scoring.cascade is "0,0"`},
		{name: "cut", args: []string{"--scoring.cascade=-1,0.5"}, want: "cut is -1, must be positive"},
		{name: "share", args: []string{"--scoring.cascade", "0.2,1.5"}, want: "share is 1.5, must be 0 to 1"},
		{name: "no number", args: []string{"--scoring.cascade", "0.2,NaN"}, want: "share is NaN, must be 0 to 1"},
		{name: "unreproducible", args: []string{"--scoring.unreproducible", "drop"},
			want: `scoring.unreproducible is "drop"`},
		{name: "key without certificate", args: []string{"--nats.key", "k"}, want: "nats.cert and nats.key"},
		{name: "two identities", args: []string{"--nats.creds", "k", "--nats.nkey", "n"},
			want: "nats.creds and nats.nkey"},
		{name: "address", args: []string{"--metrics.address", "9464"}, want: `metrics.address is "9464"`},
		{name: "endpoint", args: []string{"--tracing.endpoint", "collector:4318"}, want: "tracing.endpoint"},
		{name: "database", args: []string{"--postgres.url", ""}, want: "postgres.url"},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append([]string{"--scoring.ensembles", "x"}, c.args...)
			config, err := parsedConfig(t, c.file, c.env, args...)
			if err == nil {
				err = config.Check()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one that says %q", err, c.want)
			}
		})
	}
	if err := DefaultConfig().Check(); err == nil || !strings.Contains(err.Error(), "scoring.ensembles") {
		t.Errorf("defaults: %v, want only the required setting to be missing", err)
	}
}

func TestLogFormats(t *testing.T) {
	var out bytes.Buffer
	log, err := LogConfig{Level: "warn", Format: "json"}.Logger(&out)
	if err != nil {
		t.Fatal(err)
	}
	log.Info("hidden")
	log.Warn("seen", "err", context.Canceled)
	got := out.String()
	if !strings.HasPrefix(got, "{") || !strings.Contains(got, `"err":"context canceled"`) ||
		strings.Contains(got, "hidden") {
		t.Errorf("logged %q", got)
	}
	for _, wrong := range []LogConfig{{"loud", "text"}, {"info", "xml"}} {
		if _, err := wrong.Logger(&out); err == nil {
			t.Errorf("%+v is accepted", wrong)
		}
	}
}

func TestRedactedAddressesHoldNoSecret(t *testing.T) {
	got := settings.Redact("nats://user:secret@a:4222, nats://b:4222")
	if strings.Contains(got, "secret") || !strings.Contains(got, "nats://a:4222") {
		t.Errorf("redacted to %q", got)
	}
}

// Lists of mappings are read from the file, in place of their group too, and from the environment and flags.
func TestRulesAreRead(t *testing.T) {
	const list = `[{model: m, class: Bag, labels: {tenant: a, plan: b}, share: 0.1}, {class: 3, share: 1}]`
	block := `
  - model: m
    class: Bag
    labels: {tenant: a, plan: b}
    share: 0.1
  - {class: 3, share: 1}
`
	want := withRules(t, Config{}, list, "").Sampling.Rules
	for name, read := range map[string]func() (Config, error){
		"list":  func() (Config, error) { return parsedConfig(t, "sampling: "+list, nil) },
		"block": func() (Config, error) { return parsedConfig(t, "sampling:"+block, nil) },
		"rules": func() (Config, error) { return parsedConfig(t, "sampling: {salt: x, rules: "+list+"}", nil) },
		"flag":  func() (Config, error) { return parsedConfig(t, "", nil, "--sampling.rules", list) },
		"environment": func() (Config, error) {
			return parsedConfig(t, "", map[string]string{"DECUWATCH_SAMPLING_RULES": list})
		},
		"flag over file": func() (Config, error) {
			return parsedConfig(t, "sampling: [{share: 0}]", nil, "--sampling.rules="+list)
		},
	} {
		c, err := read()
		if err != nil || !reflect.DeepEqual(c.Sampling.Rules, want) {
			t.Errorf("%s: %+v, %v; want %+v", name, c.Sampling.Rules, err, want)
		}
	}
	c, err := parsedConfig(t, "budget: [{model: m, rows-per-hour: 5, policy: defer, max-wait: 2m}]", nil)
	if err != nil || len(c.Budget.Rules) != 1 || c.Budget.Rules[0].RowsPerHour != 5 ||
		c.Budget.Rules[0].MaxWait != 2*time.Minute {
		t.Errorf("budget %+v, %v", c.Budget.Rules, err)
	}
	for file, want := range map[string]string{
		"sampling: [{shar: 1}]":                        "sampling.rules",
		"sampling: {rules: {share: 1}}":                "must be a list of mappings",
		"sampling: 0.5":                                "there is no setting sampling",
		"budget: {rules: 7}":                           "must be a list of mappings",
		"sampling: {rules: [{share: 1, share: 2}]}":    "already defined",
		"sampling: {rules: []}\nsampling: {rules: []}": "is given twice",
	} {
		if c, err := parsedConfig(t, file, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v; want %q", file, c.Sampling, err, want)
		}
	}
}

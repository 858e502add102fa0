package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"github.com/decuwatch/decuwatch/consumers/natstest"
	"github.com/decuwatch/decuwatch/internal/app"
	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres/pgtest"
)

// commands returns every verb with its flags and arguments.
func commands(t *testing.T) []*kong.Node {
	t.Helper()
	parser, err := kong.New(&cli{}, app.Documented(), names)
	if err != nil {
		t.Fatal(err)
	}
	return parser.Model.Leaves(false)
}

// words returns the words that call a verb.
func words(verb *kong.Node) []string {
	var list []string
	for node := verb; node.Parent != nil; node = node.Parent {
		list = append(list, node.Name)
	}
	slices.Reverse(list)
	return list
}

// required are the arguments without which a verb refuses to start, by the verb.
var required = map[string][]string{
	"watch": {"--no-follow"}, "score": {"--scoring.ensembles=" + faultEnsemble, "--class=0", "--seed=1"},
	"publish":           {"--model=" + faultModel, "--class=0", "--seed=1"},
	"replay":            {"e000001", "--scoring.ensembles=" + faultEnsemble},
	"dead-letters show": {"1"}, "dead-letters republish": nil, "redeliver": nil,
	"thresholds set":            {faultEnsemble, "--measurement=class_gap", "--value=1", "--reason=test", "--dry-run"},
	"thresholds from-reference": {shipped}, "thresholds rollback": {"--reason=test"},
	"thresholds calibrate": {faultEnsemble, "--measurement=class_gap", "--alpha=0.5"},
	"silences add":         {"--model=" + faultModel, "--for=1h", "--reason=test"}, "silences end": {"1"},
	"review show": {"3f2a9c"}, "review ack": {"3f2a9c"}, "review resolve": {"3f2a9c", "confirmed"},
	"review reopen": {"3f2a9c"}, "review assign": {"3f2a9c"}, "review comment": {"3f2a9c", "text"},
	"canary":           {"--scoring.ensembles=" + faultEnsemble, "--once"},
	"ensemble inspect": {shipped}, "ensemble verify": {faultEnsemble},
	"rescore": {"--model=" + faultModel, "--since=1h"}, "compare": {faultEnsemble, shipped}, "promote": {faultEnsemble},
	"eval": {faultEnsemble}, "migrate down": nil, "completion": {"bash"},
}

// tinyLabel is the label of class 1 of the tiny ensemble.
const tinyLabel = "class-1"

// freeText are the flags and arguments that take any text.
var freeText = []string{
	"by", "reason", "comment", "source", "search", "assignee", "settings", "label", "name", "text", "words", "config",
	"noise", "sampler", "images", "out", "dir", "path", "ensemble", "file", "event", "truth",
	"old", "new",
}

// wrongFlags are values that flags and arguments of a name must refuse beside what their type refuses.
var wrongFlags = map[string][]string{
	"model": {"A b"}, "class": {"-1", "Submarine"}, "id": {"0"}, "kind": {"bogus"}, "order": {"sideways"},
	"measurement": {"bogus"}, "verdict": {"bogus"}, "severity": {"warning"}, "pool": {"few"}, "state": {"closed"},
	"shell": {"csh"}, "stay": {"maybe"}, "profile": {"x"}, "listen": {"nowhere"}, "new-id": {"maybe"},
	"latent": {"/nowhere"}, "dtype": {"int8"},
}

// wrongTypes are values that no flag of a type takes.
var wrongTypes = map[reflect.Type][]string{
	reflect.TypeFor[time.Duration](): {"soon", "-1s"}, reflect.TypeFor[int](): {"x", "1.5", "-1"},
	reflect.TypeFor[int64](): {"x", "-1"}, reflect.TypeFor[uint64](): {"x", "-1"}, reflect.TypeFor[bool](): {"maybe"},
	reflect.TypeFor[float64](): {"x", "NaN"}, reflect.TypeFor[time.Time](): {"yesterday"},
	reflect.TypeFor[moment](): {"yesterday", "-1s"},
}

// wrong returns values that a flag or an argument of a verb must refuse.
func wrong(t *testing.T, verb string, v *kong.Value) []string {
	t.Helper()
	kind := v.Target.Type()
	for kind.Kind() == reflect.Pointer || kind.Kind() == reflect.Slice {
		kind = kind.Elem()
	}
	values := append(slices.Clone(wrongTypes[kind]), wrongFlags[v.Name]...)
	if strings.Contains(v.Name, ".") {
		values = append(values, wrongTexts[v.Name]...)
	}
	switch verb + " " + v.Name {
	case "score id", "publish id", "replay id": // of events: any text
		return nil
	case "publish class": // the worker knows its classes, not the producer
		return []string{""}
	case "dead-letters list model", "dead-letters republish model", "redeliver model": // dead letters name anything
		return nil
	case "review show id", "review ack id", "review resolve id", "review reopen id", "review assign id",
		"review comment id":
		return []string{"3f"}
	case "watch class": // of any model
		return nil
	case "thresholds set value": // any number
		return []string{"x", "NaN", "Inf"}
	}
	if len(values) == 0 && !slices.Contains(freeText, v.Name) && !slices.Contains(wrongTexts[v.Name], "") {
		t.Errorf("decuwatch %s: %s has no wrong value here", verb, v.Name)
	}
	values = slices.DeleteFunc(values, func(s string) bool { return s == "" })
	if strings.Contains(v.Name, ".") { // TestWrongValuesOfEverySetting tries all
		values = values[:min(1, len(values))]
	}
	return values
}

// A wrong argument of any verb exits with 2, and the error names it.
func TestWrongArgumentsOfEveryVerb(t *testing.T) {
	env := map[string]string{"DECUWATCH_NATS_URL": natstest.Start(t).URL(), "DECUWATCH_POSTGRES_URL": pgtest.URL(t)}
	refused := func(name string, args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var out, errs bytes.Buffer
		getenv := func(name string) string { return env[name] }
		code := run(ctx, args, getenv, strings.NewReader(""), &out, &errs)
		if last := errs.String(); code != exitUsage || !strings.Contains(last, name) {
			t.Errorf("decuwatch %q: exit code %d, and the error must name %s:\n%s", args, code, name, last)
		}
	}
	cases := 0
	for _, verb := range commands(t) {
		call := words(verb)
		name := strings.Join(call, " ")
		least, known := required[name]
		if known && len(least) > 0 && name != "watch" {
			refused("", call...)
		}
		refused("no-such-flag", append(slices.Clone(call), "--no-such-flag")...)
		for _, flag := range verb.Flags {
			if name == "serve" && strings.Contains(flag.Name, ".") { // TestWrongValuesOfEverySetting
				continue
			}
			for _, value := range wrong(t, name, flag.Value) {
				cases++
				args := slices.DeleteFunc(slices.Clone(least), func(arg string) bool {
					return strings.HasPrefix(arg, "--"+flag.Name+"=")
				})
				refused(flag.Name, append(append(slices.Clone(call), args...), "--"+flag.Name+"="+value)...)
			}
		}
		for i, arg := range verb.Positional {
			for _, value := range wrong(t, name, arg) {
				cases++
				args := slices.Clone(least)
				if i < len(args) {
					args[i] = value
				} else {
					args = append(args, value)
				}
				refused(arg.Name, append(slices.Clone(call), append([]string{"--"}, args...)...)...)
			}
		}
		if !slices.ContainsFunc(verb.Positional, func(v *kong.Value) bool { return v.IsSlice() || !v.Required }) {
			refused("surplus", append(append(slices.Clone(call), least...), "surplus")...)
		}
	}
	for _, args := range [][]string{
		{"publish", "/no/such/file"}, {"ensemble", "inspect", "/no/such/file"}, {"score", "-e", "/no/such/file", "--class=0",
			"--seed=1"}, {"dead-letters", "republish", "1", "--event=/no/such/file"}, {"eval", "/no/such/file"},
		{"thresholds", "from-reference", "/no/such/file"}, {"watch", "--nats.nkey=/no/such/file"},
	} {
		refused("/no/such/file", args...)
	}
	t.Logf("%d cases", cases)
}

// The help of each verb says each default once, names no Go type, and lists no setting that the verb does not use.
func TestHelpOfEveryVerb(t *testing.T) {
	writes := []string{"postgres.max-conns", "postgres.committers", "postgres.batch-size", "postgres.commit-timeout"}
	for _, verb := range commands(t) {
		name := strings.Join(words(verb), " ")
		if verb.Name == "serve" {
			continue
		}
		for _, flag := range verb.Flags {
			said := strings.Count(flag.Help, "Defaults to ")
			if flag.HasDefault && flag.PlaceHolder == "" && !flag.IsBool() {
				said++ // the placeholder is the default
			}
			if said > 1 {
				t.Errorf("%s --%s says its default %d times: %s %s", name, flag.Name, said, flag.FormatPlaceHolder(), flag.Help)
			}
			if regexp.MustCompile(`FLOAT|UINT|^INT|STRING|-NAME$|-64`).MatchString(flag.FormatPlaceHolder()) {
				t.Errorf("%s --%s names a Go type: %s", name, flag.Name, flag.FormatPlaceHolder())
			}
			if slices.Contains(writes, flag.Name) && !flag.Hidden {
				t.Errorf("%s lists --%s, which only serve uses", name, flag.Name)
			}
			if flag.Name == "postgres.migrate" && !flag.Hidden {
				t.Errorf("%s lists --%s, which it does not use", name, flag.Name)
			}
		}
		stale(t, name, verb, verb.Target.Type())
	}
}

// stale fails if a tag that shows or hides settings names one that does not exist.
func stale(t *testing.T, name string, verb *kong.Node, group reflect.Type) {
	t.Helper()
	for i := range group.NumField() {
		field := group.Field(i)
		if field.Type.Kind() != reflect.Struct {
			continue
		}
		stale(t, name, verb, field.Type)
		for _, setting := range strings.Split(field.Tag.Get("shows")+","+field.Tag.Get("hides"), ",") {
			full := field.Tag.Get("prefix") + setting
			if setting != "" && !slices.ContainsFunc(verb.Flags, func(f *kong.Flag) bool { return f.Name == full }) {
				t.Errorf("%s: %s names %s, which is no setting", name, field.Name, full)
			}
		}
	}
}

// installation is a monitor with scores, alerts, reviews, silences, canaries, thresholds and dead letters.
func installation(t *testing.T) command {
	t.Helper()
	b := newBench(t, natstest.Start(t).URL(), pgtest.URL(t))
	b.stream()
	w := b.worker()
	b.publish(8)
	broken := strings.Replace(identityEvent(t, "broken", faultModel), `"seed":1`, `"seed":-1`, 1)
	b.put(schema.SubjectGeneration(faultModel), broken)
	b.until("dead letter", func() bool { return len(b.query("SELECT kind FROM decuwatch.dead_letters")) == 1 })
	b.drained()
	user := command{t, []string{"DECUWATCH_NATS_URL=" + b.natsURL, "DECUWATCH_POSTGRES_URL=" + b.pgURL}}
	user.run(exitOK, "silences", "add", "--model="+faultModel, "--for=1h", "--reason=test", "--by=tester")
	b.until("alerts are in the stream", func() bool {
		out, _ := user.run(exitOK, "watch", "--all", "--no-follow", "--json")
		return strings.Count(out, "\n") >= 8
	})
	w.stop()
	return user
}

// withWorkers are verbs that ask workers, or for the scores of two ensembles. TestShadowOfTheShippedEnsemble runs them.
var withWorkers = []string{"rescore", "compare"}

// clocks matches times of day with what stands around them.
var clocks = regexp.MustCompile(`[^\s|]*\s?\b\d{1,2}:\d\d(:\d\d)?(\.\d+)?\S*( \w+)?`)

// Every list as JSON is lines, every text for people is not, and all times have a date and one zone, UTC, whatever the
// zone of the machine.
func TestVerbsPrintOneForm(t *testing.T) {
	user := installation(t)
	user.env = append(user.env, "TZ=America/New_York")
	id := strings.TrimSpace(first(user.run(exitOK, "review", "list", "--limit=1", "--json")))
	review := decode[struct{ ID string }](t, id).ID
	calls := map[string][]string{
		"watch": {"--all", "--no-follow"}, "replay": {"e000001", "--scoring.ensembles=" + faultEnsemble}, "reconcile": nil,
		"dead-letters list": nil, "dead-letters show": {"1"}, "thresholds list": nil, "thresholds history": nil,
		"thresholds from-reference": {shipped}, "silences list": nil, "review list": nil, "review show": {review},
		"thresholds calibrate": {faultEnsemble, "--measurement=class_gap", "--alpha=0.5", "--pool=all"},
		"review stats":         nil, "ensemble inspect": {shipped}, "eval": {faultEnsemble, "--seeds=2", "--alarm-seeds=2"},
	}
	lists := []string{"watch", "dead-letters list", "thresholds list", "thresholds history", "silences list",
		"review list"}
	for _, verb := range commands(t) {
		name := strings.Join(words(verb), " ")
		args, known := calls[name]
		if !slices.ContainsFunc(verb.Flags, func(f *kong.Flag) bool { return f.Name == "json" }) {
			continue
		}
		if slices.Contains(withWorkers, name) {
			continue
		}
		if !known {
			t.Errorf("%s has --json, and no call here", name)
			continue
		}
		call := append(words(verb), args...)
		out, _ := user.process(exitOK, append(call, "--json")...)
		lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
		if len(lines) != 1 && !slices.Contains(lists, name) {
			t.Errorf("%s --json prints %d lines", name, len(lines))
		}
		for _, line := range lines {
			if !strings.HasPrefix(line, "{") {
				t.Errorf("%s --json prints a line that is no object: %.80s", name, line)
			}
			inUTC(t, name, decode[any](t, line))
		}
		text, _ := user.process(exitOK, call...)
		if text == "" || json.Valid([]byte(text)) {
			t.Errorf("%s prints for people: %.80s", name, text)
		}
		for _, clock := range clocks.FindAllString(text, -1) {
			if !regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?( UTC|Z)`).MatchString(clock) &&
				!strings.Contains(clock, "://") {
				t.Errorf("%s prints the time %q without its date or zone", name, clock)
			}
		}
	}
	_, log := user.process(exitFailed, "reconcile", "--postgres.url=postgres://127.0.0.1:1/x", "--log.level=debug")
	if regexp.MustCompile(`time=\S+[+-]\d\d:\d\d `).MatchString(log) {
		t.Errorf("the log is in another zone: %s", log)
	}
}

// inUTC fails if a time anywhere in a JSON value is in another zone.
func inUTC(t *testing.T, verb string, v any) {
	t.Helper()
	switch v := v.(type) {
	case map[string]any:
		for _, item := range v {
			inUTC(t, verb, item)
		}
	case []any:
		for _, item := range v {
			inUTC(t, verb, item)
		}
	case string:
		if _, err := time.Parse(time.RFC3339, v); err == nil && !strings.HasSuffix(v, "Z") {
			t.Errorf("%s prints the time %s, which is not in UTC", verb, v)
		}
	}
}

// Every verb with --class takes an index and a label, in upper or lower case, and means the same class.
func TestClassesByIndexAndLabel(t *testing.T) {
	user := installation(t)
	of := map[string][]string{
		"watch": {"--all", "--no-follow"}, "score": {"--scoring.ensembles=" + faultEnsemble, "--seed=1"},
		"thresholds set": {faultEnsemble, "--measurement=class_gap", "--value=1", "--reason=test", "--by=me", "--dry-run"},
		"review list":    nil, "review stats": nil,
		"silences add": {"--model=" + faultModel, "--for=1h", "--reason=test", "--by=me"},
		"publish":      {"--model=" + faultModel, "--seed=1"},
	}
	passing := regexp.MustCompile(`silence \d+|published \S+|\d{4}-\d\d-\d\dT[0-9:.]+Z|` +
		`"(class|seconds|duration|took)[a-z_]*":[^,]*|"class": [^,]*`)
	for _, verb := range commands(t) {
		name := strings.Join(words(verb), " ")
		if !slices.ContainsFunc(verb.Flags, func(f *kong.Flag) bool { return f.Name == "class" }) {
			continue
		}
		args, known := of[name]
		if slices.Contains(withWorkers, name) {
			continue
		}
		if !known {
			t.Errorf("%s has --class, and no call here", name)
			continue
		}
		var outputs []string
		for _, class := range []string{"1", tinyLabel, strings.ToUpper(tinyLabel)} {
			out, _ := user.run(exitOK, append(append(words(verb), args...), "--class="+class)...)
			outputs = append(outputs, passing.ReplaceAllString(out, ""))
		}
		if outputs[0] == "" || outputs[0] != outputs[1] || outputs[0] != outputs[2] {
			t.Errorf("%s: class 1 gives\n%s\nits label gives\n%s\nand in capitals\n%s", name, outputs[0], outputs[1], outputs[2])
		}
	}
}

// A dead letter is listed and shown. Its event is published again, corrected: with its own id if that has no verdict,
// else with a new one.
func TestDeadLetters(t *testing.T) {
	b := newBench(t, natstest.Start(t).URL(), pgtest.URL(t))
	b.stream()
	w := b.worker()
	user := command{t, []string{"DECUWATCH_NATS_URL=" + b.natsURL, "DECUWATCH_POSTGRES_URL=" + b.pgURL}}
	good := identityEvent(t, "broken", faultModel)
	strange := identityEvent(t, "strange", faultModel)
	b.put(schema.SubjectGeneration(faultModel), strings.Replace(good, `"seed":1`, `"seed":-1`, 1))
	b.put(schema.SubjectGeneration(faultModel), strings.Replace(strange, `"class":0`, `"class":77`, 1))
	b.until("dead letters", func() bool { return len(b.query("SELECT kind FROM decuwatch.dead_letters")) == 2 })
	if got := b.query(eventsQuery(t, faultSource)); len(got) != 2 {
		t.Errorf("the query of docs/events.md finds %q", got)
	}

	ids := map[string]string{}
	out, _ := user.run(exitOK, "dead-letters", "list", "--source="+faultSource, "--json")
	for line := range strings.Lines(out) {
		l := decode[struct {
			ID   json.Number
			Kind string
		}](t, line)
		ids[l.Kind] = l.ID.String()
	}
	holds(t, first(user.run(exitOK, "dead-letters", "list")), "invalid", "data.seed", "unknown_class", "broken", " UTC")
	holds(t, first(user.run(exitOK, "dead-letters", "list", "--kind=invalid", "--limit=1")), "data.seed")
	out, _ = user.run(exitOK, "dead-letters", "show", ids["invalid"])
	holds(t, out, "data.seed", `"seed":-1`, "whole", faultSource)
	shown := decode[struct{ Payload string }](t, first(user.run(exitOK, "dead-letters", "show", ids["invalid"], "--json")))
	fixed := strings.Replace(shown.Payload, `"seed":-1`, `"seed":1`, 1)

	// The invalid event keeps its id.
	_, errs := user.feed(shown.Payload, exitUsage, "dead-letters", "republish", ids["invalid"], "--event=-")
	holds(t, errs, "data.seed")
	out, _ = user.feed(fixed, exitOK, "dead-letters", "republish", ids["invalid"], "--event=-")
	holds(t, out, "can be published", "--apply")
	out, _ = user.feed(fixed, exitOK, "dead-letters", "republish", ids["invalid"], "--event=-", "--apply", "--by=me")
	holds(t, out, "was published as message 3")
	b.drained()
	holds(t, first(user.run(exitOK, "dead-letters", "list", "--kind=invalid")), " score ")

	// The other has its verdict.
	file := filepath.Join(t.TempDir(), "fixed.json")
	if err := os.WriteFile(file, []byte(strange), 0o600); err != nil {
		t.Fatal(err)
	}
	correct := []string{"dead-letters", "republish", ids["unknown_class"], "--event=" + file, "--apply", "--by=me"}
	_, errs = user.run(exitFailed, correct...)
	holds(t, errs, "have a verdict already", "--new-id")
	user.run(exitOK, append(correct, "--new-id")...)
	b.drained()
	if got := b.query("SELECT event_id FROM decuwatch.scores"); len(got) != 2 || slices.Contains(got, "strange") {
		t.Errorf("scored are %q", got)
	}

	// One vocabulary: --apply does it, the earlier names still work.
	for _, args := range [][]string{{"republish"}, {"republish", "--apply"}, {"republish", "--yes"}, {"redeliver"}} {
		user.run(exitOK, args...)
	}
	for _, args := range [][]string{
		{"dead-letters", "republish", "--event=-"}, {"dead-letters", "republish", "1", "--new-id"},
		{"dead-letters", "republish", "1", "2", "--event=-"}, {"dead-letters", "republish", "1", "--event=-", "--model=m"},
	} {
		user.run(exitUsage, args...)
	}
	w.stop()
}

// eventsQuery returns the query of docs/events.md by which producers find their broken events.
func eventsQuery(t *testing.T, source string) string {
	t.Helper()
	page, err := os.ReadFile("../../docs/events.md")
	if err != nil {
		t.Fatal(err)
	}
	query := regexp.MustCompile("(?s)```sql\nSELECT recorded_at, field, reason, event_id(.*?)```")
	found := query.FindStringSubmatch(string(page))
	if found == nil {
		t.Fatal("docs/events.md has no query")
	}
	return strings.ReplaceAll("SELECT event_id"+found[1], "//studio/render-7", source)
}

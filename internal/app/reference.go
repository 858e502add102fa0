package app

import (
	_ "embed"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

// Setting is one setting as its tags and its comment describe it.
type Setting struct {
	Group, Name, Kind, Default, Help string
	Variable                         string // of the environment
}

// help holds the comment of each setting's field. A test writes it and holds it against the comments.
//
//go:embed help.txt
var help string

// Documented gives each setting among the flags its documentation.
func Documented() kong.Option {
	documented := map[string]Setting{}
	for _, f := range Settings() {
		documented[f.Name] = f
	}
	return kong.PostBuild(func(k *kong.Kong) error {
		return kong.Visit(k.Model, func(node kong.Visitable, next kong.Next) error {
			if flag, ok := node.(*kong.Flag); ok && flag.Help == "" {
				flag.Help = documented[flag.Name].Help
			}
			return next(nil)
		})
	})
}

// Settings lists all settings in the order of Config.
func Settings() []Setting {
	texts := map[string]string{}
	for line := range strings.Lines(help) {
		name, text, _ := strings.Cut(strings.TrimSpace(line), ": ")
		texts[name] = text
	}
	var list []Setting
	config := reflect.TypeFor[Config]()
	for i := range config.NumField() {
		group := config.Field(i)
		for _, f := range reflect.VisibleFields(group.Type) {
			if f.Tag.Get("name") == "" {
				continue
			}
			name := group.Tag.Get("prefix") + f.Tag.Get("name")
			s := Setting{Group: group.Tag.Get("group"), Name: name, Kind: kind(f.Type), Default: f.Tag.Get("default"),
				Help: texts[name], Variable: environmentName(name)}
			if s.Kind == "true or false" {
				s.Default = "false"
			}
			if s.Default != "" && !strings.Contains(s.Help, "Defaults to ") {
				s.Help += " Defaults to " + s.Default + "."
			}
			list = append(list, s)
		}
	}
	return list
}

// kind says what a setting takes.
func kind(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "duration"
	case t.Kind() == reflect.Int || t.Kind() == reflect.Int64:
		return "integer"
	case t.Kind() == reflect.Float64:
		return "number"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.Slice:
		return "list"
	}
	return "text"
}

// reference returns the document docs/configuration.md.
func reference() string {
	var b strings.Builder
	b.WriteString(`# Configuration

Each setting has one name, and three places where it can stand; each beats the one before:

1. a YAML file that ` + "`--config FILE`" + ` or the environment variable ` + "`DECUWATCH_CONFIG`" + ` names, where the dots of the name nest,
2. an environment variable: ` + "`nats.url`" + ` is ` + "`DECUWATCH_NATS_URL`" + `,
3. a flag of the verbs that need it: ` + "`--nats.url`" + `.

Unknown names and names given twice in the file are errors, and so are values that do not fit. The error names the
setting, its bound, and the line of the file or the environment variable that gave the value. An environment variable
that only looks like a setting is reported at the start.

Durations are written as ` + "`90s`, `20m`, `168h`" + `. In the environment and in flags the items of a list are
separated by commas.

` + "```yaml" + `
nats:
  url: nats://nats.internal:4222
  creds: /run/secrets/decuwatch.creds
postgres:
  url: postgres://decuwatch@postgres.internal:5432/decuwatch?sslmode=verify-full&passfile=/run/secrets/pgpass
scoring:
  ensembles: [/srv/ensembles/sdxl-class, /srv/ensembles/fashion-mnist]
  device: cuda:0
log:
  format: json
` + "```" + `

The program's exit codes: 0 done, 1 failed, 2 a wrong flag, setting or argument, 3 a check found a difference.
` + "`decuwatch VERB --help`" + ` lists the settings that a verb reads.
`)
	group := ""
	for _, f := range Settings() {
		if f.Group != group {
			group = f.Group
			fmt.Fprintf(&b, "\n## %s\n\n| setting | environment | kind | meaning |\n|---|---|---|---|\n", group)
		}
		fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s |\n", f.Name, f.Variable, f.Kind, strings.ReplaceAll(f.Help, "|", `\|`))
	}
	return b.String()
}

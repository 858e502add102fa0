package app

import (
	"fmt"
	"reflect"
	"strings"
	"time"
)

// Setting is one setting as its tags describe it.
type Setting struct {
	Group, Name, Kind, Default, Help string
	Variable                         string // of the environment
}

// Settings lists all settings in the order of Config.
func Settings() []Setting {
	var fields []Setting
	config := reflect.TypeFor[Config]()
	for i := range config.NumField() {
		group := config.Field(i)
		for _, f := range reflect.VisibleFields(group.Type) {
			if f.Anonymous {
				continue // its fields follow
			}
			kind := map[reflect.Kind]string{reflect.String: "text", reflect.Bool: "true or false", reflect.Int: "integer", reflect.Int64: "integer", reflect.Float64: "number", reflect.Slice: "list"}[f.Type.Kind()]
			if f.Type == reflect.TypeFor[time.Duration]() {
				kind = "duration"
			}
			fallback := f.Tag.Get("default")
			if f.Type.Kind() == reflect.Bool {
				fallback = "false"
			}
			name := group.Tag.Get("prefix") + f.Tag.Get("name")
			fields = append(fields, Setting{
				Group: group.Tag.Get("group"), Name: name, Kind: kind, Default: fallback, Help: f.Tag.Get("help"),
				Variable: environmentName(name),
			})
		}
	}
	return fields
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

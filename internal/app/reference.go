package app

import (
	_ "embed"
	"encoding"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

// Setting describes one setting: its tags and its comment.
type Setting struct {
	Group, Name, Kind, Default, Help string
	Variable                         string // of the environment
}

// help has the comment of each setting's field. A test writes it and compares it with the comments.
//
//go:embed help.txt
var help string

// Documented adds the documentation to each flag that is a setting.
func Documented() kong.Option {
	documented := map[string]Setting{}
	for _, f := range Settings() {
		documented[f.Name] = f
	}
	return kong.PostBuild(func(k *kong.Kong) error {
		return kong.Visit(k.Model, func(node kong.Visitable, next kong.Next) error {
			switch node := node.(type) {
			case *kong.Flag:
				if node.Help == "" {
					node.Help = documented[node.Name].Help
				}
				if node.HasDefault && node.PlaceHolder == "" && strings.Contains(node.Help, "Defaults to ") {
					node.PlaceHolder = placeholder(node.Target.Type()) // instead of the default, which the text names
				}
			case *kong.Node:
				hideUnused(node, node.Target)
			}
			return next(nil)
		})
	})
}

// placeholder returns what stands for a value in the help.
func placeholder(t reflect.Type) string {
	switch kind(t) {
	case "duration":
		return "DURATION"
	case "integer":
		return "N"
	case "number":
		return "X"
	}
	return "TEXT"
}

// hideUnused hides from a verb's help the settings of a group that the verb does not use. The tag shows of the group's
// field lists those that it does use, or the tag hides the others. Hidden settings can be given all the same, as in an
// environment that serves several verbs.
func hideUnused(verb *kong.Node, group reflect.Value) {
	if group.Kind() != reflect.Struct {
		return
	}
	for i := range group.NumField() {
		field := group.Type().Field(i)
		if _, embedded := field.Tag.Lookup("embed"); !embedded {
			continue
		}
		prefix := field.Tag.Get("prefix")
		shown, some := field.Tag.Lookup("shows")
		hidden := field.Tag.Get("hides")
		hideUnused(verb, group.Field(i))
		for _, flag := range verb.Flags {
			name, of := strings.CutPrefix(flag.Name, prefix)
			if of && (some && !listed(shown, name) || listed(hidden, name)) {
				flag.Hidden = true
			}
		}
	}
}

func listed(names, name string) bool { return slices.Contains(strings.Split(names, ","), name) }

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

// entries is the kind of a setting that is a list of mappings.
const entries = "list of mappings"

// kind says what a setting takes.
func kind(t reflect.Type) string {
	switch {
	case reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
		return entries
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

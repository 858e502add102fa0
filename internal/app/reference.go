package app

import (
	_ "embed"
	"reflect"
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

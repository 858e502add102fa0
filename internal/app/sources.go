package app

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v3"
)

// Sources gives flags that are settings, which have a dot in their name, their values from a file and the environment.
type Sources struct {
	Getenv func(string) string // of the environment

	path   string
	file   map[string]any    // by name: a string, or a list of strings
	origin map[string]string // by name: the line of the file or the environment variable with the value
}

// Option makes kong read the environment, and the file that --config or DECUWATCH_CONFIG names.
func (s *Sources) Option() kong.Option {
	return kong.OptionFunc(func(k *kong.Kong) error {
		return errors.Join(
			kong.Resolvers(kong.ResolverFunc(s.fromFile), kong.ResolverFunc(s.fromEnvironment)).Apply(k),
			kong.WithBeforeResolve(func(k *kong.Context) error { return s.load(configPath(k, s.Getenv)) }).Apply(k),
		)
	})
}

// load reads a YAML file, if there is one. Unknown settings are an error.
func (s *Sources) load(path string) error {
	if path == "" {
		return nil
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	var document, second yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	if err := decoder.Decode(&document); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read settings from %s: %w", path, err)
	}
	if err := decoder.Decode(&second); err == nil {
		return fmt.Errorf("%s:%d: a second document, settings must be in one", path, second.Line)
	} else if !errors.Is(err, io.EOF) {
		return fmt.Errorf("read settings from %s: %w", path, err)
	}
	s.path, s.file = path, map[string]any{}
	if len(document.Content) == 0 {
		return nil
	}
	known := map[string]string{}
	for _, f := range Settings() {
		known[f.Name] = f.Kind
	}
	return s.flatten("", document.Content[0], known)
}

// flatten adds the settings below a node.
func (s *Sources) flatten(prefix string, node *yaml.Node, known map[string]string) error {
	if node.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: %s must be a mapping of settings", s.path, node.Line,
			strings.TrimSuffix("the file."+prefix, "."))
	}
	seen := map[string]bool{}
	for i := 0; i < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		name := prefix + key.Value
		if seen[key.Value] {
			return fmt.Errorf("%s:%d: %s is given twice", s.path, key.Line, name)
		}
		seen[key.Value] = true
		if value.Kind == yaml.SequenceNode && known[name+rules] == entries { // a list in place of the group is its rules
			name += rules
		}
		if known[name] != "" {
			s.from(name, fmt.Sprintf("%s:%d", s.path, key.Line))
		}
		if value.Kind == yaml.AliasNode {
			value = value.Alias
		}
		switch {
		case known[name] == entries:
			text, err := yaml.Marshal(value)
			if err != nil {
				return fmt.Errorf("%s:%d: %s: %w", s.path, key.Line, name, err)
			}
			s.file[name] = string(text)
		case known[name] != "" && value.Kind == yaml.ScalarNode:
			if value.Tag == "!!null" {
				continue
			}
			s.file[name] = value.Value
		case known[name] != "" && value.Kind == yaml.SequenceNode:
			list := []any{}
			for _, item := range value.Content {
				if item.Kind != yaml.ScalarNode {
					return fmt.Errorf("%s:%d: %s must be a list of plain values", s.path, item.Line, name)
				}
				list = append(list, item.Value)
			}
			s.file[name] = list
		case value.Kind == yaml.MappingNode && hasPrefix(known, name+"."):
			if err := s.flatten(name+".", value, known); err != nil {
				return err
			}
		case value.Tag == "!!null" && hasPrefix(known, name+"."):
		case known[name] != "":
			return fmt.Errorf("%s:%d: %s must be a plain value", s.path, key.Line, name)
		default:
			return fmt.Errorf("%s:%d: there is no setting %s", s.path, key.Line, name)
		}
	}
	return nil
}

// rules is the name of the setting that a group's list of mappings is.
const rules = ".rules"

func hasPrefix(known map[string]string, prefix string) bool {
	for name := range known {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// fromFile returns the value of a flag in the file.
func (s *Sources) fromFile(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	if v, ok := s.file[flag.Name]; ok {
		return v, nil
	}
	return nil, nil
}

// fromEnvironment returns the value of a flag in the environment, which beats the file.
func (s *Sources) fromEnvironment(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	if !strings.Contains(flag.Name, ".") {
		return nil, nil
	}
	name := environmentName(flag.Name)
	if v := s.Getenv(name); v != "" {
		s.from(flag.Name, name)
		return v, nil
	}
	return nil, nil
}

func (s *Sources) from(setting, origin string) {
	if s.origin == nil {
		s.origin = map[string]string{}
	}
	s.origin[setting] = origin
}

var settingName = regexp.MustCompile(`\b[a-z]+\.[a-z][a-z-]*`)

// Explain returns the text of an error, with the places where the settings that it names were set.
func (s *Sources) Explain(err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ") // between joined errors
	var places []string
	for _, name := range settingName.FindAllString(text, -1) {
		if origin, ok := s.origin[name]; ok && !slices.Contains(places, origin) {
			places = append(places, origin)
		}
	}
	if len(places) == 0 {
		return text
	}
	return text + " (set by " + strings.Join(places, ", ") + ")"
}

// environmentName returns the environment variable of a setting: DECUWATCH_NATS_URL for nats.url. ONNX Runtime's
// library keeps the name that the scripts export.
func environmentName(setting string) string {
	if setting == "scoring.library" {
		return "DECUWATCH_ONNXRUNTIME_LIB"
	}
	return "DECUWATCH_" + strings.ToUpper(strings.NewReplacer(".", "_", "-", "_").Replace(setting))
}

// serviceLink matches the variables that Kubernetes makes of Services, for example of one named decuwatch-review.
var serviceLink = regexp.MustCompile(
	`_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$`)

// UnknownVariables returns the variables of an environment that look like a setting of one of the groups, but are not
// one.
func UnknownVariables(environment []string) []string {
	known, groups := map[string]bool{}, []string{}
	for _, f := range Settings() {
		known[f.Variable] = true
		group, _, _ := strings.Cut(f.Name, ".")
		groups = append(groups, environmentName(group)+"_")
	}
	var unknown []string
	for _, variable := range environment {
		name, _, _ := strings.Cut(variable, "=")
		inGroup := slices.ContainsFunc(groups, func(group string) bool { return strings.HasPrefix(name, group) })
		if inGroup && !known[name] && !serviceLink.MatchString(name) {
			unknown = append(unknown, name)
		}
	}
	return unknown
}

// EmptyVariables returns the variables of an environment that name a setting and are empty. They leave the setting as
// it is, so a default such as an address stays.
func EmptyVariables(environment []string) []string {
	var empty []string
	for _, f := range Settings() {
		if slices.Contains(environment, f.Variable+"=") {
			empty = append(empty, f.Variable)
		}
	}
	return empty
}

// configPath returns the path of the settings file in the arguments or the environment, or "".
func configPath(k *kong.Context, getenv func(string) string) string {
	for _, flag := range k.Flags() {
		if flag.Name == "config" {
			if path, ok := k.FlagValue(flag).(string); ok && path != "" {
				return path
			}
		}
	}
	return getenv("DECUWATCH_CONFIG")
}

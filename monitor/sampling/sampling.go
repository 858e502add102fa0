// Package sampling decides by lot which events are scored, and how likely each was to be. The lot is a function of a
// salt and the event's identity, so that every delivery, every replica and every later re-score draws the same.
package sampling

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"go.yaml.in/yaml/v3"

	"github.com/decuwatch/decuwatch/internal/modelname"
	"github.com/decuwatch/decuwatch/internal/settings"
	"github.com/decuwatch/decuwatch/schema"
)

// Config says which share of the events is scored. Fields with a name are settings.
type Config struct {
	// Rules for the share of events that are scored: a list of mappings with share (0 to 1) and, to say which events it
	// is for, any of model, class (label or index) and labels. The first rule that matches an event decides; without
	// one, the event is scored. Defaults to none.
	Rules Rules `name:"rules" placeholder:"LIST"`
	// Text that the lot depends on beside the event's identity; all workers must have the same. Who knows it can choose
	// ids that are not sampled out.
	Salt string `name:"salt" default:"decuwatch"`
	// Classes with at most this many training images, by the ensemble's manifest, are only sampled out by a rule that
	// names the class.
	FewImages int `name:"few-images" default:"100" min:"0"`
}

// Check returns an error that names the settings out of their bounds, and rules that can never apply.
func (c Config) Check() error {
	errs := []error{settings.Check("sampling", c)}
	for i, r := range c.Rules {
		if err := r.check(); err != nil {
			errs = append(errs, settings.Errorf("sampling.rules: entry %d: %w", i+1, err))
		}
	}
	return errors.Join(append(errs, shadowed(c.Rules, func(i int) string { return fmt.Sprint(i + 1) }))...)
}

// Rules are rules in the order in which they are tried.
type Rules []Rule

// UnmarshalText reads a YAML list.
func (r *Rules) UnmarshalText(text []byte) (err error) {
	*r, err = settings.Entries[Rule](text, "share")
	return err
}

// Rule is the share of some events that are scored.
type Rule struct {
	Model  string            `yaml:"model"`  // "" means every model
	Class  Class             `yaml:"class"`  // empty means every class, except those with few training images
	Labels map[string]string `yaml:"labels"` // that the event must have; it may have others
	Share  float64           `yaml:"share"`
}

// Class is a class by its label or its index. Its zero value is no class.
type Class struct {
	schema.Class
	set bool
}

// UnmarshalYAML reads an integer as an index, and a text as a label.
func (c *Class) UnmarshalYAML(node *yaml.Node) error {
	var index int
	switch {
	case node.Tag == "!!int" && node.Decode(&index) == nil && index >= 0:
		*c = Class{schema.ClassIndex(index), true}
	case node.Tag == "!!str" && node.Value != "":
		*c = Class{schema.ClassLabel(node.Value), true}
	default:
		return fmt.Errorf("class is %q, must be a label, or an index from 0", node.Value)
	}
	return nil
}

func (r Rule) check() error {
	var errs []error
	if !(r.Share >= 0 && r.Share <= 1) {
		errs = append(errs, fmt.Errorf("share is %v, must be 0 to 1", r.Share))
	}
	if r.Model != "" && !modelname.Valid(r.Model) {
		errs = append(errs, fmt.Errorf("model is %q, must be a model's name: %s", r.Model, modelname.Rule))
	}
	if len(r.Labels) > schema.MaxLabels {
		errs = append(errs, fmt.Errorf("labels has %d entries, events have at most %d", len(r.Labels), schema.MaxLabels))
	}
	return errors.Join(errs...)
}

// covers reports whether every event that matches o matches r.
func (r Rule) covers(o Rule) bool {
	return (r.Model == "" || r.Model == o.Model) && (!r.Class.set || r.Class == o.Class) && r.labeled(o.Labels)
}

// labeled reports whether the labels hold those of the rule.
func (r Rule) labeled(labels map[string]string) bool {
	for key, value := range r.Labels {
		if v, ok := labels[key]; !ok || v != value {
			return false
		}
	}
	return true
}

// shadowed returns an error that names each rule that can never apply, because an earlier one matches all its events.
func shadowed(rules []Rule, name func(int) string) error {
	var errs []error
	for i, r := range rules {
		if j := slices.IndexFunc(rules[:i], func(before Rule) bool { return before.covers(r) }); j >= 0 {
			errs = append(errs, settings.Errorf("sampling.rules: entry %s can never apply: entry %s comes first and matches "+
				"all of its events; put the more special rule first", name(i), name(j)))
		}
	}
	return errors.Join(errs...)
}

// Sampler draws for the events of one model.
type Sampler struct {
	salt  string
	rules []Rule // whose class is an index, or a label that the model does not have
	few   []bool // classes with few training images
}

// For returns the sampler of a model, whose classes have labels and training images. The error names rules that can
// never apply to it, because two of them name one class by label and by index. Unknown are classes that rules name and
// the model does not have.
func (c Config) For(model string, labels []string, images []int) (s Sampler, unknown []string, err error) {
	s = Sampler{salt: c.Salt, few: make([]bool, len(labels))}
	for class := range s.few {
		s.few[class] = class >= len(images) || images[class] <= c.FewImages
	}
	var entries []int
	for i, r := range c.Rules {
		if r.Model != "" && r.Model != model {
			continue
		}
		r.Model = ""
		if r.Class.set {
			if class := slices.Index(labels, r.Class.Label); r.Class.Label != "" && class >= 0 {
				r.Class.Class = schema.ClassIndex(class)
			} else if r.Class.Label != "" || r.Class.Index >= len(labels) {
				unknown = append(unknown, r.Class.String())
			}
		}
		s.rules, entries = append(s.rules, r), append(entries, i+1)
	}
	return s, unknown, shadowed(s.rules, func(i int) string { return fmt.Sprint(entries[i]) })
}

// Share returns the share of events like this one that is scored, before anything else lowers it. Class is the index of
// its class, or -1 if the model does not have the class. Free says that nothing else may lower it: the event is a
// canary, or of a class with few training images, or of an unknown one, and no rule names that.
func (s Sampler) Share(ev schema.Event, class int) (share float64, free bool) {
	if ev.Source == schema.CanarySource {
		return 1, true
	}
	rare := class < 0 || s.few[class]
	named := ev.Data.Class
	if class >= 0 {
		named = schema.ClassIndex(class)
	}
	for _, r := range s.rules {
		if (r.Class.set && r.Class.Class == named || !r.Class.set && !rare) && r.labeled(ev.Data.Labels) {
			return r.Share, false
		}
	}
	return 1, rare
}

// Selects reports whether an event that is scored with the given probability is scored.
func (s Sampler) Selects(ev schema.Event, probability float64) bool {
	return probability >= 1 || Uniform(s.salt, "sample", ev.Source, ev.ID) < probability
}

// Uniform returns a number from 0 to below 1 for an event: the first 53 bits of a salted SHA-256 of its identity.
// Numbers of different purposes are independent of each other.
func Uniform(salt, purpose, source, id string) float64 {
	var text []byte
	for _, part := range []string{salt, purpose, source, id} {
		text = binary.AppendUvarint(text, uint64(len(part))) // so that no two lists of parts make the same text
		text = append(text, part...)
	}
	sum := sha256.Sum256(text)
	return float64(binary.BigEndian.Uint64(sum[:8])>>11) / (1 << 53)
}

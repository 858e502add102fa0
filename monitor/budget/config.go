package budget

import (
	"errors"
	"fmt"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/decuwatch/decuwatch/internal/modelname"
	"github.com/decuwatch/decuwatch/internal/settings"
)

// Config bounds the rows of backbone work that are spent. Fields with a name are settings.
type Config struct {
	// Budgets of models: a list of mappings with model (else it is for each model), rows-per-hour, rows-per-day, policy
	// (what happens when the rows are used up: defer, sample or skip), and max-wait (how long the oldest event may wait
	// before fewer events are scored). The first that names a model decides. Defaults to none.
	Rules Rules `name:"rules" placeholder:"LIST"`
	// Lowest share of events that a budget or max-wait leaves to be scored.
	LeastShare float64 `name:"least-share" default:"0.01" min:"0.0001" max:"1"`
}

// Check returns an error that names the settings out of their bounds.
func (c Config) Check() error {
	errs := []error{settings.Check("budget", c)}
	for i, r := range c.Rules {
		if err := r.check(); err != nil {
			errs = append(errs, settings.Errorf("budget.rules: entry %d: %w", i+1, err))
		}
		for j, before := range c.Rules[:i] {
			if before.Model == "" || before.Model == r.Model {
				errs = append(errs, settings.Errorf("budget.rules: entry %d can never apply: entry %d comes first and is for "+
					"its model, too", i+1, j+1))
				break
			}
		}
	}
	return errors.Join(errs...)
}

// For returns the budget of a model. It is the zero Rule, without bounds, if there is none.
func (c Config) For(model string) Rule {
	for _, r := range c.Rules {
		if r.Model == "" || r.Model == model {
			return r
		}
	}
	return Rule{}
}

// Rules are the budgets of models.
type Rules []Rule

// UnmarshalText reads a YAML list.
func (r *Rules) UnmarshalText(text []byte) (err error) {
	*r, err = settings.Entries[Rule](text)
	return err
}

// Rule is the budget of a model.
type Rule struct {
	Model       string        `yaml:"model"`         // "" means each model, with a budget of its own
	RowsPerHour Rows          `yaml:"rows-per-hour"` // 0 means no bound
	RowsPerDay  Rows          `yaml:"rows-per-day"`  // 0 means no bound
	Policy      Policy        `yaml:"policy"`
	MaxWait     time.Duration `yaml:"max-wait"` // 0 means no bound
}

// Rows is a number of rows.
type Rows int

// UnmarshalYAML reads an integer from 1.
func (r *Rows) UnmarshalYAML(node *yaml.Node) error {
	var n int
	if node.Tag != "!!int" || node.Decode(&n) != nil || n < 1 {
		return fmt.Errorf("rows are %q, must be an integer of at least 1", node.Value)
	}
	*r = Rows(n)
	return nil
}

// Policy is what becomes of events when the rows are used up.
type Policy string

// Policies of a budget.
const (
	Defer  Policy = "defer"  // they stay in the stream until there is room
	Sample Policy = "sample" // fewer are scored, by lot
	Skip   Policy = "skip"   // they are recorded as skipped
)

func (r Rule) bounded() bool { return r.RowsPerHour > 0 || r.RowsPerDay > 0 }

func (r Rule) check() error {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if r.Model != "" && !modelname.Valid(r.Model) {
		refuse("model is %q, must be a model's name: %s", r.Model, modelname.Rule)
	}
	if r.MaxWait != 0 && r.MaxWait < time.Second {
		refuse("max-wait is %s, must be at least 1s", r.MaxWait)
	}
	switch r.Policy {
	case Defer, Sample, Skip:
		if !r.bounded() {
			refuse("policy is %s without rows-per-hour or rows-per-day", r.Policy)
		}
	case "":
		if r.bounded() {
			refuse("policy is missing: with rows-per-hour or rows-per-day it must be defer, sample or skip")
		} else if r.MaxWait == 0 {
			refuse("it bounds nothing: rows-per-hour, rows-per-day or max-wait is missing")
		}
	default:
		refuse("policy is %q, must be defer, sample or skip", string(r.Policy))
	}
	return errors.Join(errs...)
}

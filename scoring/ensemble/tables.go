package ensemble

import (
	"fmt"
	"math"
	"slices"
)

// Tables of the ensemble that no measurement reads, only evaluations.
const (
	TablesProducers = "producers" // further trainings of the producer's kind
	TablesReference = "reference" // the backbone's own, fully trained table
)

// Tables is a set of tables of class embeddings. It is read-only.
type Tables struct {
	count     int
	classes   int
	embedding int       // numbers of a class embedding
	rows      []float32 // [count, classes+1, embedding]
	shared    []float32 // [embedding]
	more      []*Tables // rows of the manifest's Conditioning, in its order
}

// More returns the rows of the further inputs of the backbone, in the order of the manifest's Conditioning. Their
// embeddings have the shapes that the manifest gives them.
func (t *Tables) More() []*Tables { return t.more }

// Count returns the number of tables.
func (t *Tables) Count() int { return t.count }

// Classes returns the number of classes.
func (t *Tables) Classes() int { return t.classes }

// Row returns the embedding [tokens, dim] of a class in a table, which must not be written to. The class after the last
// is the unconditional one of classifier-free guidance.
func (t *Tables) Row(table, class int) []float32 {
	at := (table*(t.classes+1) + class) * t.embedding
	return t.rows[at : at+t.embedding : at+t.embedding]
}

// Shared returns the unconditional embedding [tokens, dim] of shared guidance: the mean over the tables of their own.
func (t *Tables) Shared() []float32 { return t.shared }

func (t *Tables) setShared() {
	t.shared = make([]float32, t.embedding)
	for i := range t.shared {
		sum := 0.0
		for table := range t.count {
			sum += float64(t.Row(table, t.classes)[i])
		}
		t.shared[i] = float32(sum / float64(t.count))
	}
}

// Tables returns a set of tables by its name, or nil if the ensemble does not have it.
func (e *Ensemble) Tables(name string) *Tables { return e.tables[name] }

// Members returns the tables of the M components.
func (e *Ensemble) Members() *Tables { return e.tables[TablesMembers] }

// tensorRule says which tensor of the tables file holds a set, and how many tables.
type tensorRule struct {
	tensor   string
	count    int // 0 for a tensor without a leading axis, -1 for a free number
	required bool
}

// tensorRules returns the rules of all sets that an ensemble may have.
func (e *Ensemble) tensorRules() map[string]tensorRule {
	rules := map[string]tensorRule{
		TablesMembers:   {"tables", e.Components, true},
		TablesReference: {"reference", 0, false},
	}
	if e.Format == Format1 {
		return rules
	}
	rules[TablesProducer] = tensorRule{"producer", 0, e.Posterior > 0 || e.Profile.ImageRisk != (Measure{})}
	rules[TablesProducers] = tensorRule{"producers", -1, false}
	if e.Posterior > 0 {
		rules[TablesPosterior] = tensorRule{"posterior", e.Posterior, true}
	}
	return rules
}

// readTables takes the sets of tables from the tables file.
func (e *Ensemble) readTables(content []byte) error {
	tensors, err := parseSafetensors(content)
	if err != nil {
		return err
	}
	e.tables = map[string]*Tables{}
	for name, rule := range e.tensorRules() {
		t, ok := tensors[rule.tensor]
		if !ok && rule.required {
			return fmt.Errorf("tensor %q is missing", rule.tensor)
		}
		if !ok {
			continue
		}
		delete(tensors, rule.tensor)
		if e.tables[name], err = e.newTables(rule, e.contextShape(), t); err != nil {
			return fmt.Errorf("tensor %q %w", rule.tensor, err)
		}
		if err := e.readMore(e.tables[name], rule, tensors); err != nil {
			return err
		}
	}
	for name := range tensors {
		return fmt.Errorf("tensor %q is unknown", name)
	}
	return e.checkPosterior()
}

// readMore takes the rows of a set for the further inputs of the backbone.
func (e *Ensemble) readMore(set *Tables, rule tensorRule, tensors map[string]tensor) error {
	for _, c := range e.Conditioning {
		name := rule.tensor + "." + c.Name
		t, ok := tensors[name]
		if !ok {
			return fmt.Errorf("tensor %q is missing", name)
		}
		delete(tensors, name)
		more, err := e.newTables(rule, c.Shape, t)
		if err == nil && more.count != set.count {
			err = fmt.Errorf("has %d tables, must have %d", more.count, set.count)
		}
		if err != nil {
			return fmt.Errorf("tensor %q %w", name, err)
		}
		set.more = append(set.more, more)
	}
	return nil
}

// contextShape returns the shape of a class embedding in the tables.
func (e *Ensemble) contextShape() []int {
	if e.Context.Tokens > 1 {
		return []int{e.Context.Tokens, e.Context.Dim}
	}
	return []int{e.Context.Dim}
}

// newTables checks a tensor, whose rows have the given shape, and makes a set of it.
func (e *Ensemble) newTables(rule tensorRule, row []int, t tensor) (*Tables, error) {
	want, n := append([]int{len(e.Classes) + 1}, row...), Conditioning{Shape: row}.Size()
	count := max(rule.count, 1)
	if rule.count < 0 && len(t.shape) > 0 {
		count = min(t.shape[0], maxProducers)
	}
	if rule.count != 0 {
		want = append([]int{count}, want...)
	}
	if !slices.Equal(t.shape, want) {
		return nil, fmt.Errorf("has shape %v, the manifest needs %v", t.shape, want)
	}
	for i, v := range t.data {
		if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
			return nil, fmt.Errorf("holds %v at row %d, element %d", v, i/n, i%n)
		}
	}
	tables := &Tables{count: count, classes: len(e.Classes), embedding: n, rows: t.data}
	tables.setShared()
	return tables, nil
}

// maxProducers bounds the tables that are there for evaluation only.
const maxProducers = 64

// checkPosterior returns an error unless every posterior table has the producer's unconditional row.
func (e *Ensemble) checkPosterior() error {
	posterior := e.tables[TablesPosterior]
	if posterior == nil {
		return nil
	}
	producer := e.tables[TablesProducer]
	for k, set := range append([]*Tables{posterior}, posterior.more...) {
		unconditional := append([]*Tables{producer}, producer.more...)[k].Row(0, len(e.Classes))
		for i := range set.count {
			if !slices.Equal(set.Row(i, len(e.Classes)), unconditional) {
				return fmt.Errorf(`tensor "posterior": table %d has another unconditional row than the producer`, i)
			}
		}
	}
	return nil
}

package postgres

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"

	"github.com/decuwatch/decuwatch/schema"
)

// column is a column that holds a part of what belongs to a measurement. The measurement's name and the suffix are its
// name.
type column[T any] struct {
	suffix string
	part   func(*T) any // points to the part
}

// stored says how each measurement is stored, in scores and in the rollups. A new measurement is a new entry here, and
// a migration with its columns.
var stored = []struct {
	name   schema.MeasurementName
	scores []column[schema.Measurement]
	sums   []column[sums]
}{
	{schema.ClassGap, slices.Concat(path, spread), slices.Concat(summed, sampled, saturated)},
	{schema.RequestRisk, slices.Concat(path, spread), slices.Concat(lacking, summed, sampled, saturated)},
	{schema.ImageRisk, slices.Concat(path, judged), slices.Concat(counted, summed, sampled)},
}

var (
	// path is what every measurement has.
	path = []column[schema.Measurement]{
		{"", func(m *schema.Measurement) any { return &m.Value }},
		{"_estimator", func(m *schema.Measurement) any { return &m.Estimator }},
		{"_upper_bound", func(m *schema.Measurement) any { return &m.UpperBound }},
		{"_tables", func(m *schema.Measurement) any { return &m.Tables }},
		{"_guidance", func(m *schema.Measurement) any { return &m.Guidance }},
		{"_steps", func(m *schema.Measurement) any { return &m.Steps }},
		{"_branch_step", func(m *schema.Measurement) any { return &m.BranchStep }},
		{"_rollout_steps", func(m *schema.Measurement) any { return &m.RolloutSteps }},
	}
	// spread is what a measurement of the distances of several tables has.
	spread = []column[schema.Measurement]{
		{"_saturated", func(m *schema.Measurement) any { return &m.Saturated }},
		{"_mean_distance", func(m *schema.Measurement) any { return &m.MeanDistance }},
		{"_distances", func(m *schema.Measurement) any { return &m.Distances }},
		{"_shares", func(m *schema.Measurement) any { return &m.Shares }},
	}
	// judged is what a measurement by a judge has.
	judged = []column[schema.Measurement]{
		{"_top", func(m *schema.Measurement) any { return &m.Top }},
	}
)

// columns returns the columns of scores that hold measurements.
func (scoreRow) columns() []string {
	var names []string
	for _, m := range stored {
		names = append(names, columnNames(m.name, m.scores)...)
	}
	return names
}

func columnNames[T any](of schema.MeasurementName, columns []column[T]) []string {
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = string(of) + c.suffix
	}
	return names
}

// MarshalJSON writes the row. The columns of what was not measured are left out: they are NULL.
func (r scoreRow) MarshalJSON() ([]byte, error) {
	type plain scoreRow
	row, err := json.Marshal(plain(r))
	for _, m := range stored {
		if of := r.measured[m.name]; of != nil && err == nil {
			row, err = appendColumns(row, m.name, m.scores, of)
		}
	}
	return row, err
}

// UnmarshalJSON reads the row. What was not measured has no value.
func (r *scoreRow) UnmarshalJSON(row []byte) error {
	type plain scoreRow
	var columns map[string]json.RawMessage
	if err := json.Unmarshal(row, (*plain)(r)); err != nil {
		return err
	}
	if err := json.Unmarshal(row, &columns); err != nil {
		return err
	}
	r.measured = map[schema.MeasurementName]*schema.Measurement{}
	for _, m := range stored {
		if value := columns[string(m.name)]; value == nil || string(value) == "null" {
			continue
		}
		of := &schema.Measurement{}
		for _, c := range m.scores {
			name := string(m.name) + c.suffix
			if err := json.Unmarshal(columns[name], c.part(of)); err != nil {
				return fmt.Errorf("column %s: %w", name, err)
			}
		}
		if string(columns[string(m.name)+"_tables"]) == "null" { // the row is older than the column
			of.Tables, of.Guidance, of.Steps = "members", "own", r.Steps
		}
		r.measured[m.name] = of
	}
	return nil
}

// appendColumns adds the columns of a measurement to the JSON of a row. A list is never NULL.
func appendColumns[T any](row []byte, name schema.MeasurementName, columns []column[T], of *T) ([]byte, error) {
	out := bytes.NewBuffer(bytes.TrimSuffix(row, []byte("}")))
	for _, c := range columns {
		value, err := json.Marshal(c.part(of))
		if err != nil {
			return nil, fmt.Errorf("column %s%s: %w", name, c.suffix, err)
		}
		if list := reflect.ValueOf(c.part(of)).Elem(); list.Kind() == reflect.Slice && list.IsNil() {
			value = []byte("[]")
		}
		fmt.Fprintf(out, `,"%s%s":%s`, name, c.suffix, value)
	}
	out.WriteByte('}')
	return out.Bytes(), nil
}

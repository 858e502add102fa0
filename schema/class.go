package schema

import (
	"encoding/json"
	"errors"
	"strconv"
)

// Class names a class by index or by label; in JSON it is a number or a string.
type Class struct {
	Index int    // -1 if Label is set
	Label string // "" if Index is set
}

// ClassIndex returns the class with the given index.
func ClassIndex(i int) Class { return Class{Index: i} }

// ClassLabel returns the class with the given label.
func ClassLabel(label string) Class { return Class{Index: -1, Label: label} }

// ParseClass returns the class that a person means: an index if the text is a number, else a label.
func ParseClass(text string) Class {
	if i, err := strconv.Atoi(text); err == nil {
		return ClassIndex(i)
	}
	return ClassLabel(text)
}

// String returns the label in quotes, or the index.
func (c Class) String() string {
	if c.Label != "" {
		return strconv.Quote(c.Label)
	}
	return strconv.Itoa(c.Index)
}

// MarshalJSON writes a number or a string.
func (c Class) MarshalJSON() ([]byte, error) {
	if c.Label != "" {
		return json.Marshal(c.Label)
	}
	return json.Marshal(c.Index)
}

// UnmarshalJSON reads a number or a string; anything else is an error.
func (c *Class) UnmarshalJSON(b []byte) error {
	var index int
	if err := json.Unmarshal(b, &index); err == nil && len(b) > 0 && b[0] != 'n' {
		*c = ClassIndex(index)
		return nil
	}
	var label string
	if err := json.Unmarshal(b, &label); err != nil || label == "" {
		return errors.New("class must be an index (integer) or a label (string that is not empty)")
	}
	*c = ClassLabel(label)
	return nil
}

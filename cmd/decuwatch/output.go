package main

import (
	"context"
	"encoding/json"
	"io"
	"strings"

	"github.com/decuwatch/decuwatch/schema"
	"github.com/decuwatch/decuwatch/schema/postgres"
)

// writeJSON writes a value as one line.
func writeJSON(w io.Writer, v any) error {
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	return out.Encode(v)
}

// writeIndented writes a value as people read it.
func writeIndented(w io.Writer, v any) error {
	out := json.NewEncoder(w)
	out.SetIndent("", "  ")
	out.SetEscapeHTML(false)
	return out.Encode(v)
}

// writeLines writes each item of a list as one line.
func writeLines[T any](w io.Writer, list []T) error {
	for _, item := range list {
		if err := writeJSON(w, item); err != nil {
			return err
		}
	}
	return nil
}

// storedClass returns the class that a flag names by its index or its label, or nil if it names none. A label is looked
// up among the classes that were scored.
func storedClass(ctx context.Context, store *postgres.Store, model, text string) (*int, string, error) {
	if text == "" {
		return nil, "", nil
	}
	class := schema.ParseClass(text)
	if class.Label == "" && class.Index < 0 {
		return nil, "", usage("--class is %d, must be 0 or more", class.Index)
	}
	found, err := store.ClassesScored(ctx, model, class)
	if err != nil {
		return nil, "", err
	}
	switch {
	case class.Label == "" && len(found) != 1: // of several models, or not scored yet
		return &class.Index, "", nil
	case len(found) == 0:
		return nil, "", usage("--class: no request of a class %q was scored; give its index", text)
	case len(found) == 1:
		return &found[0].Index, found[0].Label, nil
	}
	var names []string
	for _, f := range found {
		names = append(names, f.Model)
	}
	return nil, "", usage("--class %q is ambiguous (%s): give --model, or the class's index", text,
		strings.Join(names, ", "))
}

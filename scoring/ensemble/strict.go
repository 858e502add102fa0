package ensemble

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// decodeStrict decodes one JSON document into the struct that v points to. It refuses a field that is unknown, missing
// (unless tagged omitempty), written twice or in another case, and anything after the document.
func decodeStrict(document []byte, v any) error {
	err := json.Unmarshal(document, v, json.RejectUnknownMembers(true))
	var syntax *jsontext.SyntacticError
	var semantic *json.SemanticError
	switch {
	case errors.Is(err, jsontext.ErrDuplicateName) && errors.As(err, &syntax):
		return fmt.Errorf("field %s is written twice", path(syntax.JSONPointer))
	case errors.Is(err, json.ErrUnknownName) && errors.As(err, &semantic):
		return fmt.Errorf("field %s is unknown", path(semantic.JSONPointer))
	case err != nil:
		return err
	}
	return checkMissing(document, reflect.TypeOf(v).Elem(), "")
}

// path writes a pointer as errors name fields: latent.depth.
func path(p jsontext.Pointer) string { return strings.Join(slices.Collect(p.Tokens()), ".") }

// checkMissing returns an error that names a field of the struct type t that the object at the pointer lacks.
func checkMissing(object jsontext.Value, t reflect.Type, at jsontext.Pointer) error {
	var members map[string]jsontext.Value
	if err := json.Unmarshal(object, &members); err != nil {
		return err
	}
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		value, found := members[name]
		if !found && options != "omitempty" {
			return fmt.Errorf("field %s is missing", path(at.AppendToken(name)))
		}
		if found {
			if err := checkStructs(value, f.Type, at.AppendToken(name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkStructs checks a value that is a struct, or a list or a map of structs.
func checkStructs(value jsontext.Value, t reflect.Type, at jsontext.Pointer) (err error) {
	switch kind := t.Kind(); {
	case kind == reflect.Struct:
		return checkMissing(value, t, at)
	case kind == reflect.Slice && t.Elem().Kind() == reflect.Struct:
		var list []jsontext.Value
		err = json.Unmarshal(value, &list)
		for i := 0; i < len(list) && err == nil; i++ {
			err = checkMissing(list[i], t.Elem(), at.AppendToken(strconv.Itoa(i)))
		}
	case kind == reflect.Map && t.Elem().Kind() == reflect.Struct:
		var members map[string]jsontext.Value
		err = json.Unmarshal(value, &members)
		for name, element := range members {
			if err == nil {
				err = checkMissing(element, t.Elem(), at.AppendToken(name))
			}
		}
	}
	return err
}

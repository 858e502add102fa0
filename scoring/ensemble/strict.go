package ensemble

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// decodeStrict decodes one JSON document into the struct that v points to. It refuses a field that is unknown, missing
// (unless tagged omitempty), written twice or in another case, and anything after the document.
func decodeStrict(document []byte, v any) error {
	d := jsontext.NewDecoder(bytes.NewReader(document))
	err := checkFields(d, reflect.TypeOf(v).Elem())
	var syntax *jsontext.SyntacticError
	if errors.As(err, &syntax) && errors.Is(err, jsontext.ErrDuplicateName) {
		return fmt.Errorf("field %s is written twice", path(syntax.JSONPointer))
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(document, v)
}

// checkFields reads one value and holds the names in its objects against the fields of t.
func checkFields(d *jsontext.Decoder, t reflect.Type) error {
	switch kind := d.PeekKind(); {
	case kind == '{' && t.Kind() == reflect.Struct:
		return checkStruct(d, t)
	case kind == '{' && t.Kind() == reflect.Map, kind == '[' && t.Kind() == reflect.Slice:
		return checkElements(d, t.Elem())
	}
	return d.SkipValue()
}

func checkStruct(d *jsontext.Decoder, t reflect.Type) error {
	fields, missing := map[string]reflect.Type{}, map[string]bool{}
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		fields[name] = f.Type
		missing[name] = options != "omitempty"
	}
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	at := d.StackPointer()
	for {
		token, err := d.ReadToken()
		if err != nil {
			return err
		}
		if token.Kind() == '}' {
			break
		}
		name := token.String()
		if fields[name] == nil {
			return fmt.Errorf("field %s is unknown", path(at.AppendToken(name)))
		}
		delete(missing, name)
		if err := checkFields(d, fields[name]); err != nil {
			return err
		}
	}
	for name, must := range missing {
		if must {
			return fmt.Errorf("field %s is missing", path(at.AppendToken(name)))
		}
	}
	return nil
}

// checkElements checks the values of a map or a list.
func checkElements(d *jsontext.Decoder, t reflect.Type) error {
	open, err := d.ReadToken()
	named := open.Kind() == '{'
	for err == nil && d.PeekKind() != '}' && d.PeekKind() != ']' {
		if named {
			_, err = d.ReadToken()
		}
		if err == nil {
			err = checkFields(d, t)
		}
	}
	if err == nil {
		_, err = d.ReadToken()
	}
	return err
}

// path writes a pointer as errors name fields: latent.depth.
func path(p jsontext.Pointer) string { return strings.Join(slices.Collect(p.Tokens()), ".") }

package ensemble

import (
	stdjson "encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/decuwatch/decuwatch/scoring/diffusion"
)

// decodeManifest decodes a manifest of either format and fills in what format 1 leaves out.
func decodeManifest(document []byte) (*Manifest, error) {
	var head struct {
		Format string `json:"format"`
	}
	if err := json.Unmarshal(document, &head, jsontext.AllowDuplicateNames(true)); err != nil {
		return nil, err
	}
	format, known := map[string]string{Format1: "1", Format2: "2"}[head.Format]
	if !known {
		return nil, fmt.Errorf("format is %q, this reader knows %q and %q", head.Format, Format1, Format2)
	}
	var written struct {
		Manifest
		Profile struct { // takes the place of the manifest's
			Profile
			Steps int `json:"steps" format:"1"` // of both measurements
		} `json:"profile"`
	}
	if err := decodeStrict(document, &written, format); err != nil {
		return nil, err
	}
	m, p := &written.Manifest, written.Profile.Profile
	if format == "1" {
		for _, measure := range []*Measure{&p.ClassGap, &p.RequestRisk} {
			measure.Tables, measure.Guidance, measure.Steps = TablesMembers, GuidanceOwn, written.Profile.Steps
		}
	}
	m.Profile = p.Of(m.Diffusion)
	return m, nil
}

// decodeStrict decodes one JSON document into the struct that v points to. It refuses a field that is unknown, missing
// (unless tagged omitempty or omitzero), null (unless it is a pointer or raw JSON), written twice or in another case,
// and anything after the document. A field with a tag format is unknown in documents of other formats, one with a tag
// kind in objects of another kind.
func decodeStrict(document []byte, v any, format string) error {
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
	return strict{format}.object(document, reflect.TypeOf(v).Elem(), "")
}

// path writes a pointer as errors name fields: latent.depth.
func path(p jsontext.Pointer) string { return strings.Join(slices.Collect(p.Tokens()), ".") }

// strict finds fields that a document lacks, or that documents of its format do not have.
type strict struct{ format string }

// object checks the object at the pointer, of the struct type t.
func (s strict) object(object jsontext.Value, t reflect.Type, at jsontext.Pointer) error {
	var members map[string]jsontext.Value
	if err := json.Unmarshal(object, &members); err != nil {
		return err
	}
	for _, f := range reflect.VisibleFields(t) {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous || !f.IsExported() || name == "-" {
			continue // the fields of an anonymous one are listed, too
		}
		value, found := members[name]
		format, bound := f.Tag.Lookup("format")
		kind, some := f.Tag.Lookup("kind")
		has := (!bound || s.format == format) && (!some || kindOf(members) == kind)
		if some && !diffusion.KnownKind(kindOf(members)) {
			continue // the kind is refused later
		}
		field := at.AppendToken(name)
		switch {
		case found && !has:
			return fmt.Errorf("field %s is unknown", path(field))
		case found:
			if err := s.value(value, f.Type, field); err != nil {
				return err
			}
		case has && options == "":
			return fmt.Errorf("field %s is missing", path(field))
		}
	}
	return nil
}

// kindOf returns the kind of an object whose fields depend on it.
func kindOf(members map[string]jsontext.Value) (kind string) {
	if err := json.Unmarshal(members["kind"], &kind); err != nil {
		return diffusion.KindDDIM // it is left out, or no text, which decoding refuses
	}
	return kind
}

// value checks a value of type t: structs in it, and that nothing is null that has another value by that.
func (s strict) value(value jsontext.Value, t reflect.Type, at jsontext.Pointer) (err error) {
	if t == reflect.TypeFor[stdjson.RawMessage]() {
		return nil
	}
	if value.Kind() == 'n' {
		if t.Kind() == reflect.Pointer {
			return nil
		}
		return fmt.Errorf("field %s is null", path(at))
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.value(value, t.Elem(), at)
	case reflect.Struct:
		return s.object(value, t, at)
	case reflect.Slice, reflect.Array:
		var list []jsontext.Value
		err = json.Unmarshal(value, &list)
		for i := 0; i < len(list) && err == nil; i++ {
			err = s.value(list[i], t.Elem(), at.AppendToken(strconv.Itoa(i)))
		}
	case reflect.Map:
		var members map[string]jsontext.Value
		err = json.Unmarshal(value, &members)
		for name, element := range members {
			if err == nil {
				err = s.value(element, t.Elem(), at.AppendToken(name))
			}
		}
	}
	return err
}

package ensemble

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
)

var rawMessage = reflect.TypeFor[json.RawMessage]()

// decodeStrict decodes one JSON document into the struct that v points to. Unlike encoding/json it refuses a field that
// is missing (unless tagged omitempty), written twice or in another case, and anything after the document.
func decodeStrict(document []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(document))
	d.UseNumber()
	if err := checkKeys(d, reflect.TypeOf(v).Elem(), ""); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more than one JSON document")
	}
	return json.Unmarshal(document, v)
}

// checkKeys reads one value and holds the keys of its objects against the fields of t. A nil t, and a json.RawMessage,
// take any keys, but none twice.
func checkKeys(d *json.Decoder, t reflect.Type, path string) error {
	token, err := d.Token()
	if err != nil {
		return err
	}
	if t == rawMessage {
		t = nil
	}
	switch token {
	case json.Delim('{'):
		fields, required := map[string]reflect.Type{}, map[string]bool{}
		if t != nil && t.Kind() == reflect.Struct {
			for i := range t.NumField() {
				name, options, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
				fields[name] = t.Field(i).Type
				required[name] = options != "omitempty"
			}
		}
		seen := map[string]bool{}
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return err
			}
			name := key.(string)
			if seen[name] {
				return fmt.Errorf("field %s%s is written twice", path, name)
			}
			seen[name] = true
			var value reflect.Type
			if t != nil {
				switch t.Kind() {
				case reflect.Struct:
					if value = fields[name]; value == nil {
						return fmt.Errorf("field %s%s is unknown", path, name)
					}
				case reflect.Map:
					value = t.Elem()
				}
			}
			if err := checkKeys(d, value, path+name+"."); err != nil {
				return err
			}
		}
		for name := range required {
			if required[name] && !seen[name] {
				return fmt.Errorf("field %s%s is missing", path, name)
			}
		}
		_, err = d.Token() // the closing brace
	case json.Delim('['):
		var value reflect.Type
		if t != nil && t.Kind() == reflect.Slice {
			value = t.Elem()
		}
		for i := 0; d.More(); i++ {
			if err := checkKeys(d, value, fmt.Sprintf("%s[%d].", strings.TrimSuffix(path, "."), i)); err != nil {
				return err
			}
		}
		_, err = d.Token()
	}
	return err
}

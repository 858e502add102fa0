package schema

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

const maxNesting = 8

// parse reads one value of I-JSON (RFC 7493): names within an object are unique, and text is valid Unicode without
// noncharacters. Numbers stay literal. The error names the field in which the JSON is broken, below the path at.
func parse(payload []byte, at ...string) (any, error) {
	p := parser{jsontext.NewDecoder(bytes.NewReader(payload)), at}
	if !utf8.Valid(payload) {
		return nil, p.refuse("is not UTF-8")
	}
	v, err := p.value(1)
	if err != nil {
		return nil, err
	}
	if _, err := p.in.ReadToken(); !errors.Is(err, io.EOF) {
		return nil, p.refuse("holds more than one JSON value")
	}
	return v, nil
}

type parser struct {
	in *jsontext.Decoder // refuses names that are given twice
	at []string          // names of the objects' members that lead to the value
}

func (p *parser) value(depth int) (any, error) {
	if depth > maxNesting {
		return nil, p.refuse("is nested deeper than %d levels", maxNesting)
	}
	token, err := p.token()
	if err != nil {
		return nil, err
	}
	switch token.Kind() {
	case '{':
		return p.object(depth)
	case '[':
		return p.list(depth)
	case '"':
		return token.String(), nil
	case '0':
		return json.Number(token.String()), nil
	case 'n':
		return nil, nil
	}
	return token.Bool(), nil
}

func (p *parser) object(depth int) (any, error) {
	fields := map[string]any{}
	for {
		token, err := p.token()
		if err != nil {
			return nil, err
		}
		if token.Kind() == '}' {
			return fields, nil
		}
		name := token.String()
		p.at = append(p.at, pathName(name))
		if fields[name], err = p.value(depth + 1); err != nil {
			return nil, err
		}
		p.at = p.at[:len(p.at)-1]
	}
}

func (p *parser) list(depth int) (any, error) {
	var list []any
	for p.in.PeekKind() != ']' {
		v, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	_, err := p.token()
	return list, err
}

func (p *parser) token() (jsontext.Token, error) {
	token, err := p.in.ReadToken()
	var syntax *jsontext.SyntacticError
	switch {
	case err == nil && token.Kind() == '"' && strings.ContainsFunc(token.String(), noncharacter):
		return token, p.refuse("holds a noncharacter, which I-JSON forbids")
	case err == nil:
		return token, nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return token, p.refuse("is not JSON: ends too early")
	case errors.As(err, &syntax) && errors.Is(err, jsontext.ErrDuplicateName):
		p.at = append(p.at, pathName(syntax.JSONPointer.LastToken()))
		return token, p.refuse("is given twice")
	case errors.As(err, &syntax):
		return token, p.refuse("is not JSON as in RFC 7493 (I-JSON): %s at byte %d", syntax.Err, syntax.ByteOffset)
	}
	return token, p.refuse("is not JSON: %s", err)
}

func (p *parser) refuse(format string, args ...any) error {
	at := "payload"
	if len(p.at) > 0 {
		at = strings.Join(p.at, ".")
	}
	return invalid(at, format, args...)
}

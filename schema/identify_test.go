package schema

import (
	"strings"
	"testing"
)

// What can be read of an event's identity is read, however broken the rest of the message is.
func TestIdentify(t *testing.T) {
	for _, c := range []struct {
		name       string
		header     map[string][]string
		payload    string
		source, id string
	}{
		{"a valid event's", nil, `{"specversion":"1.0","source":"/s","id":"1","data":{}}`, "/s", "1"},
		{"broken after them", nil, `{"source":"/s","id":"1","data":{`, "/s", "1"},
		{"broken between them", nil, `{"source":"/s","time":x,"id":"1"}`, "/s", ""},
		{"one of them missing", nil, `{"source":"/s","data":{"id":"inner"}}`, "/s", ""},
		{"of other types", nil, `{"source":7,"id":["1"]}`, "", ""},
		{"given twice", nil, `{"source":"/s","id":"1","id":"2"}`, "/s", ""},
		{"after a deep value", nil, `{"data":` + strings.Repeat("[", 50) + strings.Repeat("]", 50) +
			`,"source":"/s","id":"1"}`, "/s", "1"},
		{"too long", nil, `{"source":"` + strings.Repeat("s", MaxSource+1) + `","id":"` + strings.Repeat("i", MaxID+1) +
			`"}`, "", ""},
		{"control characters", nil, `{"source":"/s\u0000","id":"1\n"}`, "", ""},
		{"no JSON", nil, "\x00\xff", "", ""},
		{"a list", nil, `["source","/s"]`, "", ""},
		{"empty", nil, "", "", ""},
		{"headers", map[string][]string{"ce-source": {"/s%20x"}, "Ce-Id": {"1"}}, `{"source":"/other","id":"2"}`, "/s x",
			"1"},
		{"headers twice", map[string][]string{"ce-source": {"/s"}, "ce-id": {"1", "2"}}, "", "/s", ""},
		{"headers twice by case", map[string][]string{"ce-source": {"/s"}, "ce-id": {"1"}, "CE-ID": {"1"}}, "", "/s", ""},
		{"a header that is not percent-encoded", map[string][]string{"ce-source": {"/s"}, "ce-id": {"%zz"}}, "", "/s", ""},
	} {
		if source, id := Identify(c.header, []byte(c.payload)); source != c.source || id != c.id {
			t.Errorf("%s: %q and %q, want %q and %q", c.name, source, id, c.source, c.id)
		}
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add("/s", `{"source":"/s","id":"1"}`)
	f.Fuzz(func(t *testing.T, header, payload string) {
		for _, h := range []map[string][]string{nil, {"ce-source": {header}, "ce-id": {header}}} {
			source, id := Identify(h, []byte(payload))
			if len(source) > MaxSource || len(id) > MaxID || !printable(source) || !printable(id) {
				t.Errorf("%q and %q", source, id)
			}
			// It never contradicts the decoder.
			if e, err := Decode(h, []byte(payload)); err == nil && (source != e.Source || id != e.ID) {
				t.Errorf("%q and %q, decoded %q and %q", source, id, e.Source, e.ID)
			}
		}
	})
}

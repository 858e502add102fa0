package schema

import (
	"bytes"
	"encoding/json"
	"strings"
)

// Identify reads source and id from a message that [Decode] refuses, so that the event's producer finds the refusal.
// Each is "" if it is missing, given twice or invalid. If the JSON is broken, only the part before the error is read.
func Identify(header map[string][]string, payload []byte) (source, id string) {
	values := map[string]string{}
	twice := map[string]bool{}
	see := func(name, value string) {
		_, seen := values[name]
		twice[name] = twice[name] || seen
		values[name] = value
	}
	binary, structured := false, false
	for name, list := range header {
		attribute, ce := strings.CutPrefix(strings.ToLower(name), "ce-")
		binary = binary || ce
		for _, v := range list {
			if strings.EqualFold(name, "content-type") && strings.HasPrefix(strings.ToLower(v), mediaCloudEvents) {
				structured = true
			}
			if text, err := headerValue(attribute, v); ce && err == nil {
				see(attribute, text)
			}
		}
	}
	if structured || !binary { // headers may then repeat what the payload says
		clear(values)
		clear(twice)
		identifyJSON(payload[:min(len(payload), MaxPayload)], see)
	}
	read := func(name string, most int) string {
		v := values[name]
		if twice[name] || len(v) > most || !printable(v) {
			return ""
		}
		return v
	}
	return read("source", MaxSource), read("id", MaxID)
}

// identifyJSON calls see for each string at the top level of a JSON object, until the end or the first syntax error.
func identifyJSON(payload []byte, see func(name, value string)) {
	dec := json.NewDecoder(bytes.NewReader(payload))
	if token, err := dec.Token(); err != nil || token != json.Delim('{') {
		return
	}
	for dec.More() {
		token, err := dec.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return
		}
		var text string
		if json.Unmarshal(value, &text) == nil {
			see(name, text)
		}
	}
}

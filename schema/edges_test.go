package schema

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"
	"time"
)

// TestTimes holds times against RFC 3339, section 5.6.
func TestTimes(t *testing.T) {
	for stamp, want := range map[string]string{ // "": refused
		"2026-03-01T12:00:00Z":                                 "2026-03-01T12:00:00Z",
		"2026-03-01t12:00:00z":                                 "2026-03-01T12:00:00Z",
		"2026-03-01T12:00:00-00:00":                            "2026-03-01T12:00:00Z",
		"2026-03-01T12:00:00+23:59":                            "2026-02-28T12:01:00Z",
		"2026-03-01T12:00:00-23:59":                            "2026-03-02T11:59:00Z",
		"2020-01-01T00:30:00+01:00":                            "2019-12-31T23:30:00Z", // the year as it is written
		"2026-03-01T12:00:00.1Z":                               "2026-03-01T12:00:00.1Z",
		"2026-03-01T12:00:00.123456789012Z":                    "2026-03-01T12:00:00.123456Z",
		"2024-02-29T12:00:00Z":                                 "2024-02-29T12:00:00Z",
		"2026-06-30T23:59:60Z":                                 "2026-07-01T00:00:00Z",
		"2026-06-30T23:59:60.5Z":                               "2026-07-01T00:00:00.5Z",
		"2026-07-01T01:59:60+02:00":                            "2026-07-01T00:00:00Z",
		"2026-06-30T22:59:60Z":                                 "",
		"2026-06-30T23:59:61Z":                                 "",
		"2026-03-01T12:00:00,5Z":                               "",
		"2026-03-01T1:00:00Z":                                  "",
		"2026-03-01T+1:00:00Z":                                 "",
		"2026-03-01T24:00:00Z":                                 "",
		"2026-03-01T12:60:00Z":                                 "",
		"2026-03-01T12:00:00.Z":                                "",
		"2026-03-01T12:00:00":                                  "",
		"2026-03-01T12:00:00+24:00":                            "",
		"2026-03-01T12:00:00+01:60":                            "",
		"2026-03-01T12:00:00+0100":                             "",
		"2026-03-01T12:00:00+1:00":                             "",
		"2026-03-01 12:00:00Z":                                 "",
		"2026-03-01T12:00:00Z ":                                "",
		"2025-02-29T12:00:00Z":                                 "",
		"2026-04-31T12:00:00Z":                                 "",
		"2026-00-10T12:00:00Z":                                 "",
		"2019-12-31T23:30:00-01:00":                            "",
		"0000-01-01T00:00:00Z":                                 "",
		"9999-12-31T23:59:59Z":                                 "",
		"2026-03-01T12:00:00." + strings.Repeat("1", 60) + "Z": "",
	} {
		e := valid()
		e["time"] = stamp
		for name, mode := range modes {
			got, err := Decode(mode(t, e))
			if want == "" {
				wantInvalid(t, stamp+", "+name, err, "time", "")
			} else if err != nil || got.Time.Format(time.RFC3339Nano) != want {
				t.Errorf("%s, %s: %s, %v; want %s", stamp, name, got.Time.Format(time.RFC3339Nano), err, want)
			}
		}
	}
	e := valid()
	e["time"] = time.Now().Add(MaxClockAhead + time.Hour).UTC().Format(time.RFC3339)
	_, err := Decode(structuredMode(t, e))
	wantInvalid(t, "ahead", err, "time", "ahead of the time")
	e["time"] = time.Now().Add(MaxClockAhead - time.Hour).UTC().Format(time.RFC3339)
	if _, err := Decode(structuredMode(t, e)); err != nil {
		t.Error(err)
	}
}

// TestTimesAtTheEdgesCanBeEncoded encodes times whose year in UTC is not the one that was written.
func TestTimesAtTheEdgesCanBeEncoded(t *testing.T) {
	for _, stamp := range []string{"2020-01-01T00:00:00+23:59", "2020-01-01T00:30:00.000001+01:00", "2020-01-01T00:00:00Z",
		"2099-12-31T23:59:59.999999Z", "2099-12-31T23:59:60Z", "2099-12-31T23:59:59-23:59"} {
		e := valid()
		e["time"] = stamp
		header, payload := structuredMode(t, e)
		stored := time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
		want, err := DecodeAt(header, payload, stored)
		if err != nil {
			t.Fatalf("%s: %v", stamp, err)
		}
		written := formatTime(want.Time)
		e["time"] = written
		header, payload = structuredMode(t, e)
		got, err := DecodeAt(header, payload, stored)
		if err != nil || !got.Time.Equal(want.Time) {
			t.Errorf("%s is written %s and read %s, %v", stamp, written, got.Time, err)
		}
		if want.Time.Year() > 2020 {
			continue // ahead of this machine's clock
		}
		if _, _, err := Encode(want); err != nil {
			t.Errorf("%s cannot be encoded: %v", stamp, err)
		}
	}
}

// TestNumbers holds numbers by their value, however they are written, with exponents that a library cannot expand.
func TestNumbers(t *testing.T) {
	for _, c := range []struct {
		path, number string
		want         any // nil: refused
	}{
		{"seed", "1.0", uint64(1)}, {"seed", "1e0", uint64(1)}, {"seed", "10e-1", uint64(1)}, {"seed", "-0", uint64(0)},
		{"seed", "0e99999999999999999999", uint64(0)},
		{"seed", "9007199254740993", uint64(9007199254740993)}, {"seed", "1.8446744073709551615e19",
			uint64(18446744073709551615)},
		{"seed", "18446744073709551615.0", uint64(18446744073709551615)}, {"seed", "18446744073709551615.5", nil},
		{"seed", "1.8446744073709551616e19", nil},
		{"seed", "1E400", nil}, {"seed", "1e99999999999999999999", nil}, {"seed", "1e-99999999999999999999", nil},
		{"seed", "1.5", nil}, {"seed", "-1", nil},
		{"sampler.guidance_scale", "1e-99999999999999999999", 0.0}, {"sampler.guidance_scale", "3e1", 30.0},
		{"sampler.guidance_scale", "-0.0", 0.0},
		{"sampler.guidance_scale", "30.00000000000000000000000001", nil}, {"sampler.guidance_scale", "-1e-400", nil},
		{"sampler.guidance_scale", "1e99999999999999999999", nil},
		{"sampler.eta", "1.00000000000000000001", nil}, {"sampler.eta", "0.99999999999999999999", 1.0},
		{"sampler.steps", "5e1", 50}, {"sampler.steps", "50.00", 50}, {"sampler.steps", "50.5", nil},
	} {
		e := valid()
		set("data."+c.path, json.Number(c.number))(e)
		got, err := Decode(structuredMode(t, e))
		if c.want == nil {
			wantInvalid(t, c.path+" "+c.number, err, "data."+c.path, "must be")
			continue
		}
		if err != nil {
			t.Errorf("%s %s: %v", c.path, c.number, err)
			continue
		}
		value := map[string]any{
			"seed": got.Data.Seed, "sampler.guidance_scale": got.Data.Sampler.GuidanceScale,
			"sampler.eta": got.Data.Sampler.Eta, "sampler.steps": got.Data.Sampler.Steps,
		}[c.path]
		if value != c.want {
			t.Errorf("%s %s is %v, want %v", c.path, c.number, value, c.want)
		}
	}
}

// TestBinaryMode holds headers against section 3.1.3 of the CloudEvents NATS binding, and the modes against section 3.
func TestBinaryMode(t *testing.T) {
	header, data := binaryMode(t, valid())
	_, payload := structuredMode(t, valid())
	delete(header, "Content-Type")
	with := func(pairs ...string) map[string][]string {
		h := maps.Clone(header)
		for i := 0; i < len(pairs); i += 2 {
			h[pairs[i]] = []string{pairs[i+1]}
		}
		return h
	}
	for _, c := range []struct {
		name   string
		header map[string][]string
		id     string
	}{
		{"no content type", header, "01J9-17"},
		{"a content type that is JSON", with("Content-Type", `application/json; charset="UTF-8"`), "01J9-17"},
		{"datacontenttype", with("ce-datacontenttype", "application/json"), "01J9-17"},
		{"percent-encoding", with("Ce-id", "Euro%20%E2%82%AC%20%F0%9F%98%80"), "Euro € 😀"},
		{"lower-case hex", with("Ce-id", "%e2%82%ac"), "€"},
		{"needless encoding", with("Ce-id", "%61%62"), "ab"},
		{"one round", with("Ce-id", "%2541"), "%41"},
		{"plus is plus", with("Ce-id", "a+b"), "a+b"},
		{"quoted string", with("Ce-id", `"a \"b\" \\ %43"`), `a "b" \ C`},
		{"space around", with("Ce-id", " \ta "), "a"},
	} {
		if e, err := Decode(c.header, data); err != nil || e.ID != c.id {
			t.Errorf("%s: id %q, want %q (%v)", c.name, e.ID, c.id, err)
		}
	}
	lower := map[string][]string{}
	for name, values := range header {
		lower[strings.ToUpper(name)] = values
	}
	if _, err := Decode(lower, data); err != nil {
		t.Errorf("upper-case names: %v", err)
	}
	for _, c := range []struct {
		name          string
		header        map[string][]string
		payload       []byte
		field, reason string
	}{
		{"overlong UTF-8", with("Ce-id", "%C0%A0"), data, "id", "UTF-8"},
		{"raw UTF-8", with("Ce-id", "€"), data, "id", "percent-encoded"},
		{"bad escape", with("Ce-id", "100%"), data, "id", "percent-encoding"},
		{"open quote", with("Ce-id", `"a`), data, "id", "quoted string"},
		{"text after the quote", with("Ce-id", `"a"b`), data, "id", "quoted string"},
		{"empty value", with("Ce-id", ""), data, "id", "1 to 256"},
		{"encoded control character", with("Ce-id", "a%00"), data, "id", "control"},
		{"data in a header", with("ce-data", "{}"), data, "data", "payload"},
		{"data_base64 in a header", with("ce-data_base64", "e30="), data, "data_base64", "attribute"},
		{"no name", with("ce-", "x"), data, `""`, "attribute"},
		{"datacontenttype in XML", with("ce-datacontenttype", "text/xml"), data, "datacontenttype", "application/json"},
		{"content type of another kind", with("Content-Type", "text/xml"), data, "content-type", "application/json"},
		{"content type with another charset", with("Content-Type", "application/json; charset=latin1"), data,
			"content-type", "utf-8"},
		{"empty content type", with("Content-Type", ""), data, "content-type", "media type"},
		{"content type in two cases", with("Content-Type", "application/json", "content-type", "application/json"),
			data, "content-type", "twice"},
		{"batch", with("Content-Type", "application/cloudevents-batch+json"), data, "content-type",
			"batches are not accepted"},
		{"batch without ce- headers", map[string][]string{"Content-Type": {"application/cloudevents-batch+json"}},
			[]byte("[" + string(payload) + "]"), "content-type", "batches are not accepted"},
		{"another event format", map[string][]string{"Content-Type": {"application/cloudevents+avro"}}, payload,
			"content-type", contentTypeStructured},
		{"structured, another charset",
			map[string][]string{"Content-Type": {"application/cloudevents+json; charset=utf-16"}}, payload,
			"content-type", "utf-8"},
		{"structured, a header says another id", map[string][]string{"Content-Type": {"application/cloudevents+json"},
			"ce-id": {"other"}}, payload, "id", "payload"},
		{"structured, a header says more", map[string][]string{"Content-Type": {"application/cloudevents+json"},
			"ce-other": {"x"}}, payload, "other", "payload"},
	} {
		_, err := Decode(c.header, c.payload)
		wantInvalid(t, c.name, err, c.field, c.reason)
	}
	for _, contentType := range []string{"application/cloudevents", "Application/CloudEvents+JSON; charset=utf-8"} {
		if _, err := Decode(map[string][]string{"Content-Type": {contentType}, "ce-id": {"01J9-17"}},
			payload); err != nil {
			t.Errorf("%s: %v", contentType, err)
		}
	}
}

// TestTextThatIsNotIJSON refuses what encoding/json would replace or choose in silence.
func TestTextThatIsNotIJSON(t *testing.T) {
	for name, id := range map[string]string{
		"high surrogate alone": `\ud83d`, "low surrogate alone": `\ude00`,
		"surrogates in the wrong order": `\ude00\ud83d`, "two high surrogates": `\ud83d\ud83d`,
		"high surrogate before text": `\ud83dx`, "noncharacter": `\ufffe`, "noncharacter in a block": `\ufdd0`,
		"noncharacter of plane 1": `\ud83f\udfff`,
	} {
		_, payload := structuredMode(t, valid())
		_, err := Decode(nil, []byte(strings.Replace(string(payload), `"01J9-17"`, `"`+id+`"`, 1)))
		wantInvalid(t, name, err, "id", "I-JSON")
	}
	for id, want := range map[string]string{`\ud83d\ude00`: "😀", `\\ud83d`: `\ud83d`, `\ufffd`: "\ufffd",
		`\\\ud83d\ude00`: `\😀`} {
		_, payload := structuredMode(t, valid())
		e, err := Decode(nil, []byte(strings.Replace(string(payload), `"01J9-17"`, `"`+id+`"`, 1)))
		if err != nil || e.ID != want {
			t.Errorf("%s: %q, want %q (%v)", id, e.ID, want, err)
		}
	}
}

// TestEncodeChangesNothing shows that an event that would arrive as another one is refused.
func TestEncodeChangesNothing(t *testing.T) {
	for field, change := range map[string]func(*Event){
		"source":            func(e *Event) { e.Source = "a\xff" },
		"id":                func(e *Event) { e.ID = "a\xff" },
		"traceparent":       func(e *Event) { e.TraceParent = "00-abc" },
		"tracestate":        func(e *Event) { e.TraceState = "a\xff" },
		"data.class":        func(e *Event) { e.Data.Class = ClassLabel("a\xff") },
		"data.sampler.name": func(e *Event) { e.Data.Sampler = &Sampler{Name: "a\xff", Steps: 1} },
		"data.labels":       func(e *Event) { e.Data.Labels = map[string]string{"a": "\xff"} },
	} {
		e := validEvent
		change(&e)
		_, _, err := Encode(e)
		wantInvalid(t, field, err, field, "")
	}
}

// FuzzEncode shows that what Encode writes is decoded to the same event, and that it fits the JSON Schema.
func FuzzEncode(f *testing.F) {
	f.Add("//studio/render", "01J9-17", int64(1772366400), "fashion-mnist", "Trouser", 3, uint64(1)<<63, "torch-cuda",
		"DDIM", 50, 7.5, 0.0, "tenant", "acme")
	f.Add("s", "\xff", int64(0), "m", "", -1, uint64(0), "", "", 0, -1.0, 2.0, "", "\x00")
	f.Add("a b", "é", int64(4102444799), "M", "a\xff", 99999, uint64(1)<<53+1, "n n", "Euler a", 1000, 30.0, 1.0, "x",
		"😀")
	s := compile(f, eventSchema)
	f.Fuzz(func(t *testing.T, source, id string, at int64, model, label string, index int, seed uint64, noise,
		sampler string, steps int, guidance, eta float64, name, value string) {
		e := Event{Source: source, ID: id, Time: time.Unix(at, 0).UTC(), Data: Generation{Model: model,
			Class: Class{Index: index, Label: label}, Seed: seed, Noise: noise}}
		if label != "" {
			e.Data.Class = ClassLabel(label)
		}
		if sampler != "" {
			e.Data.Sampler = &Sampler{Name: sampler, Steps: steps, GuidanceScale: guidance, Eta: eta}
		}
		if name != "" {
			e.Data.Labels = map[string]string{name: value}
		}
		header, payload, err := Encode(e)
		if err != nil {
			return
		}
		got, err := Decode(header, payload)
		if err != nil || difference(e, got) != "" || got.Data.Seed != seed || !got.Time.Equal(e.Time) {
			t.Fatalf("\n got %+v\nwant %+v (%v)", got, e, err)
		}
		if err := validate(t, s, payload); err != nil {
			t.Fatalf("%v\n%s", err, payload)
		}
	})
}

// TestIdentifyReadsTheModeAsDecodeDoes finds the identity where Decode would.
func TestIdentifyReadsTheModeAsDecodeDoes(t *testing.T) {
	payload := []byte(`{"source": "//payload", "id": "1", "time": "soon"}`)
	structured := map[string][]string{"Content-Type": {contentTypeStructured}, "Ce-id": {"2"}}
	if source, id := Identify(structured, payload); source != "//payload" || id != "1" {
		t.Errorf("structured: %q %q", source, id)
	}
	binary := map[string][]string{"Ce-source": {"//header"}, "Ce-id": {`"a%20\"b"`}}
	if source, id := Identify(binary, payload); source != "//header" || id != `a "b` {
		t.Errorf("binary: %q %q", source, id)
	}
}

package schema

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// fields is a JSON object under test.
type fields = map[string]any

// valid returns an event with everything that the format knows, as a producer would write it.
func valid() fields {
	return fields{
		"specversion": "1.0", "type": TypeGenerationRequested, "source": "//studio/render", "id": "01J9-17",
		"time":            "2026-03-01T12:00:00.123456Z",
		"datacontenttype": "application/json", "subject": "anything",
		"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		"tracestate":  "vendor=1", "partitionkey": "acme",
		"data": fields{
			"model": "fashion-mnist", "class": 3, "seed": json.Number("18446744073709551615"), "noise": "torch-cuda",
			"sampler": fields{"name": "ddim", "steps": 50, "guidance_scale": 7.5, "eta": 0},
			"labels":  fields{"tenant": "acme", "region": "eu"},
		},
	}
}

var validEvent = Event{
	Source: "//studio/render", ID: "01J9-17", Time: time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC),
	TraceParent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", TraceState: "vendor=1",
	Data: Generation{
		Model: "fashion-mnist", Class: ClassIndex(3), Seed: math.MaxUint64, Noise: "torch-cuda",
		Sampler: &Sampler{Name: "ddim", Steps: 50, GuidanceScale: 7.5},
		Labels:  map[string]string{"tenant": "acme", "region": "eu"},
	},
}

// structuredMode and binaryMode write an event in either mode.
func structuredMode(t testing.TB, e fields) (map[string][]string, []byte) {
	t.Helper()
	payload, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]string{"content-type": {"application/cloudevents+json; charset=UTF-8"}, "Nats-Msg-Id": {"x"}},
		payload
}

func binaryMode(t testing.TB, e fields) (map[string][]string, []byte) {
	t.Helper()
	header := map[string][]string{"Content-Type": {"application/json"}}
	for name, v := range e {
		if name != "data" && name != "datacontenttype" {
			header["Ce-"+name] = []string{url.PathEscape(fmt.Sprint(v))}
		}
	}
	payload, err := json.Marshal(e["data"])
	if err != nil {
		t.Fatal(err)
	}
	return header, payload
}

var modes = map[string]func(testing.TB, fields) (map[string][]string, []byte){"structured": structuredMode,
	"binary": binaryMode}

func TestDecode(t *testing.T) {
	for name, mode := range modes {
		got, err := Decode(mode(t, valid()))
		if err != nil || !reflect.DeepEqual(got, validEvent) {
			t.Errorf("%s:\n got %+v\nwant %+v (%v)", name, got, validEvent, err)
		}
	}
	_, payload := structuredMode(t, valid())
	if _, err := Decode(nil, payload); err != nil {
		t.Errorf("structured mode without headers: %v", err)
	}
	least := fields{"specversion": "1.0", "type": TypeGenerationRequested, "source": "s", "id": "1",
		"time": "2026-03-01T14:00:00.123456789+02:00",
		"data": fields{"model": "m", "class": "Trouser", "seed": 0}}
	want := Event{Source: "s", ID: "1", Time: time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC),
		Data: Generation{Model: "m", Class: ClassLabel("Trouser")}}
	if got, err := Decode(structuredMode(t, least)); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("least event:\n got %+v\nwant %+v (%v)", got, want, err)
	}
}

// breakage changes a valid event so that it breaks the format, in one field.
type breakage struct {
	name   string
	change func(e fields)
	field  string // that the error must name
	reason string // part of the reason
}

func set(path string, v any) func(fields) {
	return func(e fields) {
		names := strings.Split(path, ".")
		for _, name := range names[:len(names)-1] {
			e = e[name].(fields)
		}
		if v == nil {
			delete(e, names[len(names)-1])
		} else {
			e[names[len(names)-1]] = v
		}
	}
}

// latentWith gives an event a latent with one other member.
func latentWith(name string, v any) func(fields) {
	return func(e fields) {
		set("data.latent", fields{"bucket": "LATENTS_fashion-mnist", "name": "a", "sha256": strings.Repeat("0", 64),
			"format": "raw", "dtype": "float16", "shape": []int{4, 8, 8}})(e)
		set("data.latent."+name, v)(e)
	}
}

var breakages = []breakage{
	{"no specversion", set("specversion", nil), "specversion", "missing"},
	{"specversion 0.3", set("specversion", "0.3"), "specversion", "1.0"},
	{"no type", set("type", nil), "type", "missing"},
	{"another type", set("type", "io.decuwatch.generation.requested.v2"), "type", TypeGenerationRequested},
	{"no source", set("source", nil), "source", "missing"},
	{"long source", set("source", strings.Repeat("s", MaxSource+1)), "source", "512"},
	{"source with a space", set("source", "a b"), "source", "URI"},
	{"source that is no URI", set("source", "http://[::1"), "source", "URI"},
	{"source with a line break", set("source", "a\nb"), "source", "control"},
	{"no id", set("id", nil), "id", "missing"},
	{"empty id", set("id", ""), "id", "1 to 256"},
	{"long id", set("id", strings.Repeat("i", MaxID+1)), "id", "256"},
	{"id with NUL", set("id", "a\x00b"), "id", "control"},
	{"no time", set("time", nil), "time", "missing"},
	{"time in words", set("time", "yesterday"), "time", "RFC 3339"},
	{"time without zone", set("time", "2026-03-01T12:00:00"), "time", "RFC 3339"},
	{"time before decuwatch", set("time", "1970-01-01T00:00:00Z"), "time", "2020"},
	{"time far ahead", set("time", "2199-01-01T00:00:00Z"), "time", "2099"},
	{"data in XML", set("datacontenttype", "text/xml"), "datacontenttype", "application/json"},
	{"attribute with a capital", set("partitionKey", "x"), "partitionKey", "attribute"},
	{"long attribute", set("partitionkey", strings.Repeat("x", MaxAttribute+1)), "partitionkey", "2048"},
	{"many attributes", func(e fields) {
		for i := range MaxAttributes {
			e[fmt.Sprint("extension", i)] = "x"
		}
	}, "payload", "27"},
	{"long id that is not ASCII", set("id", strings.Repeat("é", 65)), "id", "64 of any kind"},
	{"id that ends with a space", set("id", "a "), "id", "space"},
	{"source that is not ASCII", set("source", "//münchen/a"), "source", "URI"},
	{"data in another encoding", set("datacontenttype", "application/json; charset=latin1"), "datacontenttype",
		"application/json"},
	{"data in JSON of another kind", set("datacontenttype", "application/json-patch+json"), "datacontenttype",
		"application/json"},
	{"extension with a control character", set("partitionkey", "a\tb"), "partitionkey", "control"},
	{"noise of another dtype", set("data.noise_dtype", "int8"), "data.noise_dtype",
		"float16, bfloat16, float32, float64"},
	{"negative batch index", set("data.batch_index", -1), "data.batch_index", "0 to 65535"},
	{"large batch index", set("data.batch_index", MaxBatchIndex+1), "data.batch_index", "0 to 65535"},
	{"no images", set("data.batch_size", 0), "data.batch_size", "1 to 65536"},
	{"batch size without an index", set("data.batch_size", 2), "data.batch_size", "needs batch_index"},
	{"offset between calls", set("data.noise_offset", 6), "data.noise_offset", "multiple of 4"},
	{"offset on the CPU", func(e fields) {
		set("data.noise", "torch-cpu")(e)
		set("data.noise_offset", 4)(e)
	}, "data.noise_offset", "torch-cuda"},
	{"GPU of another generator", func(e fields) {
		set("data.noise", "decuwatch")(e)
		set("data.gpu", fields{"sms": 132, "threads_per_sm": 2048})(e)
	}, "data.gpu", "torch-cuda"},
	{"GPU of the ensemble's generator", func(e fields) {
		set("data.noise", nil)(e)
		set("data.gpu", fields{"sms": 132, "threads_per_sm": 2048})(e)
	}, "data.gpu", "torch-cuda"},
	{"GPU as text", set("data.gpu", "H100"), "data.gpu", "object"},
	{"GPU without threads", set("data.gpu", fields{"sms": 132}), "data.gpu.threads_per_sm", "missing"},
	{"GPU without SMs", set("data.gpu", fields{"sms": 0, "threads_per_sm": 2048}), "data.gpu.sms", "1 to 4096"},
	{"GPU of few threads", set("data.gpu", fields{"sms": 1, "threads_per_sm": 255}), "data.gpu.threads_per_sm",
		"256 to 8192"},
	{"GPU with a name", set("data.gpu", fields{"sms": 1, "threads_per_sm": 2048, "name": "x"}), "data.gpu.name",
		"not a field"},
	{"latent as text", set("data.latent", "x"), "data.latent", "object"},
	{"latent without a name", latentWith("name", nil), "data.latent.name", "missing"},
	{"latent whose name has a space", latentWith("name", "a b"), "data.latent.name", "printable ASCII"},
	{"latent of a bucket with a dot", latentWith("bucket", "a.b"), "data.latent.bucket", "A-Z"},
	{"latent with a short digest", latentWith("sha256", "00"), "data.latent.sha256", "64"},
	{"latent in a pickle", latentWith("format", "pickle"), "data.latent.format", "raw, safetensors"},
	{"latent of float64", latentWith("dtype", "float64"), "data.latent.dtype", "float32, float16, bfloat16"},
	{"latent of two sides", latentWith("shape", []int{4, 8}), "data.latent.shape", "3: channels"},
	{"latent with a large side", latentWith("shape", []int{4, 8, 1025}), "data.latent.shape[2]", "1 to 1024"},
	{"latent of text", latentWith("shape", []string{"4", "8", "8"}), "data.latent.shape", "integers"},
	{"latent after 1000 steps", latentWith("step", 1000), "data.latent.step", "0 to 999"},
	{"latent at a large timestep", latentWith("timestep", 100_001), "data.latent.timestep", "100000"},
	{"later latent without a timestep", latentWith("step", 3), "data.latent.step", "needs timestep"},
	{"later latent without a sampler", func(e fields) {
		latentWith("step", 3)(e)
		set("data.latent.timestep", 500)(e)
		set("data.sampler", nil)(e)
	}, "data.latent.step", "needs sampler"},
	{"latent with a URL", latentWith("url", "http://a"), "data.latent.url", "not a field"},
	{"long sampler name", set("data.sampler.name", strings.Repeat("x", MaxSamplerName+1)), "data.sampler.name", "128"},
	{"no model", set("data.model", nil), "data.model", "missing"},
	{"model that is a subject", set("data.model", "a.b.>"), "data.model", "a-z"},
	{"long model", set("data.model", strings.Repeat("m", 65)), "data.model", "64"},
	{"no class", set("data.class", nil), "data.class", "missing"},
	{"negative class", set("data.class", -1), "data.class", "99999"},
	{"class in halves", set("data.class", 1.5), "data.class", "integer"},
	{"large class", set("data.class", MaxClasses), "data.class", "99999"},
	{"empty label", set("data.class", ""), "data.class", "1 to 128"},
	{"long label", set("data.class", strings.Repeat("c", 129)), "data.class", "128"},
	{"class that is a list", set("data.class", []int{1}), "data.class", "index"},
	{"no seed", set("data.seed", nil), "data.seed", "missing"},
	{"negative seed", set("data.seed", -1), "data.seed", "18446744073709551615"},
	{"seed of 65 bits", set("data.seed", json.Number("18446744073709551616")), "data.seed", "18446744073709551615"},
	{"seed as text", set("data.seed", "1"), "data.seed", "number"},
	{"noise as number", set("data.noise", 1), "data.noise", "torch-cpu"},
	{"sampler as text", set("data.sampler", "ddim"), "data.sampler", "object"},
	{"sampler without steps", set("data.sampler.steps", nil), "data.sampler.steps", "missing"},
	{"no steps", set("data.sampler.steps", 0), "data.sampler.steps", "1 to 1000"},
	{"1e9 steps", set("data.sampler.steps", json.Number("1e9")), "data.sampler.steps", "1 to 1000"},
	{"1000000000 steps", set("data.sampler.steps", 1_000_000_000), "data.sampler.steps", "1 to 1000"},
	{"steps as text", set("data.sampler.steps", "50"), "data.sampler.steps", "number"},
	{"guidance 1e308", set("data.sampler.guidance_scale", 1e308), "data.sampler.guidance_scale", "0 to 30"},
	{"guidance beyond float", set("data.sampler.guidance_scale", json.Number("1e999")), "data.sampler.guidance_scale",
		"0 to 30"},
	{"negative guidance", set("data.sampler.guidance_scale", -0.1), "data.sampler.guidance_scale", "0 to 30"},
	{"guidance NaN as text", set("data.sampler.guidance_scale", "NaN"), "data.sampler.guidance_scale", "number"},
	{"eta 2", set("data.sampler.eta", 2), "data.sampler.eta", "0 to 1"},
	{"unknown sampler field", set("data.sampler.scheduler", "x"), "data.sampler.scheduler", "not a field"},
	{"unknown field", set("data.prompt", "a cat"), "data.prompt", "not a field"},
	{"another case", func(e fields) { set("data.Model", "fashion-mnist")(e); set("data.model", nil)(e) }, "data.Model",
		"not a field"},
	{"17 labels", func(e fields) {
		for i := range MaxLabels {
			e["data"].(fields)["labels"].(fields)[fmt.Sprint("l", i)] = "x"
		}
	}, "data.labels", "16"},
	{"long label value", set("data.labels.tenant", strings.Repeat("x", MaxLabelValue+1)), "data.labels.tenant", "128"},
	{"label value as number", set("data.labels.tenant", 7), "data.labels.tenant", "string"},
	{"label name with a space", set("data.labels.a b", "x"), "data.labels", "name"},
	{"labels as list", set("data.labels", []string{"x"}), "data.labels", "object"},
	{"data as text", set("data", "x"), "data", "object"},
}

func TestDecodeNamesTheBrokenField(t *testing.T) {
	for _, b := range breakages {
		for name, mode := range modes {
			if name == "binary" && (b.field == "datacontenttype" || b.name == "attribute with a capital") {
				continue // binary mode says it by the content type; header names have no case
			}
			e := valid()
			b.change(e)
			_, err := Decode(mode(t, e))
			wantInvalid(t, b.name+", "+name, err, b.field, b.reason)
		}
	}
}

func wantInvalid(t *testing.T, name string, err error, field, reason string) {
	t.Helper()
	var invalid *Invalid
	if !errors.As(err, &invalid) || invalid.Field != field || !strings.Contains(invalid.Reason, reason) {
		t.Errorf("%s: got %q, want field %s and a reason with %q", name, err, field, reason)
		return
	}
	if len(invalid.Reason) > 400 || !utf8.ValidString(invalid.Reason) {
		t.Errorf("%s: unwieldy reason %q", name, invalid.Reason)
	}
}

// rawBreakages are payloads that no JSON writer makes.
var rawBreakages = []struct{ name, payload, field, reason string }{
	{"empty", ``, "payload", "ends too early"},
	{"words", `hello`, "payload", "not JSON"},
	{"a list", `[1, 2]`, "payload", "object"},
	{"cut", `{"specversion": "1.0", "data": {"model": "fas`, "data.model", "ends too early"},
	{"NaN", `{"specversion": "1.0", "data": {"sampler": {"guidance_scale": NaN}}}`, "data.sampler.guidance_scale",
		"not JSON"},
	{"Infinity", `{"specversion": "1.0", "data": {"sampler": {"eta": -Infinity}}}`, "data.sampler.eta", "not JSON"},
	{"a field twice", `{"specversion": "1.0", "id": "1", "data": {"seed": 1, "seed": 2}}`, "data.seed", "twice"},
	{"two values", `{} {}`, "payload", "more than one"},
	{"no UTF-8", "{\"id\": \"\xff\"}", "payload", "UTF-8"},
	{"deep", strings.Repeat(`{"data":`, 5000), "data.data.data.data.data.data.data.data", "nested deeper than 8"},
	{"deep lists", `{"data":` + strings.Repeat(`[`, 60000), "data", "nested deeper than 8"},
	{"1 MB", `{"data": "` + strings.Repeat("x", 1<<20) + `"}`, "payload", "65536"},
	{"data in base64", `{"specversion": "1.0", "data_base64": "e30="}`, "data_base64", "JSON object"},
	{"no data", `{"specversion": "1.0"}`, "data", "missing"},
	{"missing comma", `{"specversion": "1.0" "id": "1"}`, "payload", "not JSON"},
}

func TestDecodeRefusesBrokenPayloads(t *testing.T) {
	for _, b := range rawBreakages {
		_, err := Decode(map[string][]string{"Content-Type": {contentTypeStructured}}, []byte(b.payload))
		wantInvalid(t, b.name, err, b.field, b.reason)
	}
}

func TestDecodeRefusesBrokenHeaders(t *testing.T) {
	header, payload := binaryMode(t, valid())
	with := func(name string, values ...string) map[string][]string {
		h := maps.Clone(header)
		h[name] = values
		return h
	}
	for _, b := range []struct {
		name          string
		header        map[string][]string
		field, reason string
	}{
		{"id given twice", with("Ce-id", "1", "2"), "ce-id", "2 times"},
		{"id in two cases", with("ce-id", "1"), "ce-id", "twice"},
		{"bad escape", with("Ce-id", "%zz"), "id", "percent"},
		{"data in XML", with("Content-Type", "text/xml"), "content-type", "application/json"},
		{"no media type", with("Content-Type", ";;"), "content-type", "media type"},
		{"no CloudEvent", map[string][]string{"Content-Type": {"text/plain"}}, "content-type", contentTypeStructured},
	} {
		_, err := Decode(b.header, payload)
		wantInvalid(t, b.name, err, b.field, b.reason)
	}
}

func TestMalformedTraceIsDropped(t *testing.T) {
	e := valid()
	trace, parent := strings.Repeat("a", 32), strings.Repeat("b", 16)
	for _, malformed := range []any{
		"not a trace", "ff-" + trace + "-" + parent + "-01", "00-" + strings.Repeat("0", 32) + "-" + parent + "-01",
		"00-" + trace + "-" + strings.Repeat("0", 16) + "-01", true, 7,
	} {
		e["traceparent"] = malformed
		got, err := Decode(structuredMode(t, e))
		if err != nil || got.TraceParent != "" || got.TraceState != "" {
			t.Errorf("%v: %+v %v", malformed, got, err)
		}
	}
}

func TestDigest(t *testing.T) {
	header, payload := binaryMode(t, valid())
	digest := Digest(header, payload)
	lower := map[string][]string{"Nats-Msg-Id": {"other"}, "Nats-Expected-Stream": {"x"}}
	for name, values := range header {
		lower[strings.ToLower(name)] = values
	}
	if Digest(lower, payload) != digest {
		t.Error("the case of header names, or headers of the transport, change the digest")
	}
	if Digest(header, append(slices.Clone(payload), ' ')) == digest {
		t.Error("the payload does not change the digest")
	}
	lower["ce-id"] = []string{"other"}
	if Digest(lower, payload) == digest {
		t.Error("an attribute does not change the digest")
	}
	if a, b := Digest(map[string][]string{"ce-a": {"b", "c"}}, nil),
		Digest(map[string][]string{"ce-a": {"b"}, "ce-b": {"c"}}, nil); a == b {
		t.Error("headers run into each other in the digest")
	}
}

func TestEncode(t *testing.T) {
	header, payload, err := Encode(validEvent)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(header, payload)
	if err != nil || !reflect.DeepEqual(got, validEvent) {
		t.Errorf("\n got %+v\nwant %+v (%v)", got, validEvent, err)
	}
	bad := validEvent
	bad.Data.Sampler = &Sampler{Name: "ddim", Steps: 50, GuidanceScale: math.NaN()}
	_, _, err = Encode(bad)
	wantInvalid(t, "NaN", err, "data", "NaN")
	bad.Data.Sampler = &Sampler{Name: "ddim", Steps: 5000}
	_, _, err = Encode(bad)
	wantInvalid(t, "steps", err, "data.sampler.steps", "1 to 1000")
}

func TestAlert(t *testing.T) {
	a := Alert{ID: "a1", Model: "m", Severity: SeverityCritical, ClassIndex: 7, FiredAt: validEvent.Time,
		EventTime: validEvent.Time, Receipt: Receipt{Seed: math.MaxUint64}}
	if got := AlertSubject(a); got != "uncertainty.alert.m.critical.7" {
		t.Error(got)
	}
	header, payload, err := EncodeAlert(a)
	if err != nil || header[HeaderMessageID][0] != "a1" {
		t.Fatal(header, err)
	}
	got, err := DecodeAlert(payload)
	if err != nil || !reflect.DeepEqual(got, a) {
		t.Errorf("\n got %+v\nwant %+v (%v)", got, a, err)
	}
	a.Value = math.Inf(1)
	if _, _, err := EncodeAlert(a); err == nil {
		t.Error("an infinity was encoded")
	}
	if _, err := DecodeAlert([]byte(`{"type": "other"}`)); err == nil {
		t.Error("another type was decoded")
	}
}

// FuzzDecode holds what follows for any message: no panic; an error is *Invalid, names a field and is short; what is
// accepted keeps the bounds and survives Encode.
func FuzzDecode(f *testing.F) {
	add := func(header map[string][]string, payload []byte) {
		value := func(name string) string {
			for n, v := range header {
				if strings.EqualFold(n, name) {
					return v[0]
				}
			}
			return ""
		}
		f.Add(value("content-type"), value("ce-specversion"), value("ce-type"), value("ce-source"), value("ce-id"),
			value("ce-time"), payload)
	}
	for _, b := range append(breakages, breakage{change: func(fields) {}}) {
		e := valid()
		b.change(e)
		add(structuredMode(f, e))
		add(binaryMode(f, e))
	}
	for _, b := range rawBreakages {
		add(map[string][]string{"content-type": {contentTypeStructured}}, []byte(b.payload))
	}
	f.Fuzz(func(t *testing.T, contentType, version, kind, source, id, stamp string, payload []byte) {
		header := map[string][]string{}
		for name, value := range map[string]string{"content-type": contentType, "ce-specversion": version, "ce-type": kind,
			"ce-source": source, "ce-id": id, "ce-time": stamp} {
			if value != "" {
				header[name] = []string{value}
			}
		}
		e, err := Decode(header, payload)
		if err != nil {
			var invalid *Invalid
			if !errors.As(err, &invalid) || invalid.Field == "" || invalid.Reason == "" || len(invalid.Error()) > 1000 {
				t.Fatalf("%q", err)
			}
			return
		}
		if len(e.Source) > MaxSource || len(e.ID) > MaxID || e.Time.Year() < 2019 || strings.ContainsAny(MessageID(e),
			"\r\n\x00") {
			t.Fatalf("out of bounds: %+v", e)
		}
		again, body, err := Encode(e)
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		back, err := Decode(again, body)
		if err != nil || !reflect.DeepEqual(back, e) {
			t.Fatalf("\n got %+v\nwant %+v (%v)", back, e, err)
		}
	})
}

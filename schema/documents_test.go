package schema

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"
)

const (
	eventSchema  = "jsonschema/generation.requested.v1.json"
	alertSchema  = "jsonschema/uncertainty.alert.v1.json"
	reviewSchema = "jsonschema/uncertainty.review.v1.json"
)

func compile(t testing.TB, path string) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	c.DefaultDraft(jsonschema.Draft2020)
	s, err := c.Compile(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func validate(t testing.TB, s *jsonschema.Schema, payload []byte) error {
	t.Helper()
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(payload))
	if err != nil {
		t.Fatal(err)
	}
	return s.Validate(v)
}

func TestEventSchemaAgreesWithTheDecoder(t *testing.T) {
	s := compile(t, eventSchema)
	_, payload := structuredMode(t, valid())
	if err := validate(t, s, payload); err != nil {
		t.Errorf("a valid event: %v", err)
	}
	_, payload, err := Encode(validEvent)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate(t, s, payload); err != nil {
		t.Errorf("an event by Encode: %v", err)
	}
	data := compile(t, eventSchema+"#/$defs/generation")
	_, payload = binaryMode(t, valid())
	if err := validate(t, data, payload); err != nil {
		t.Errorf("valid data in binary mode: %v", err)
	}
	// What the decoder refuses the schema refuses.
	for _, b := range breakages {
		e := valid()
		b.change(e)
		_, payload := structuredMode(t, e)
		if err := validate(t, s, payload); err == nil {
			t.Errorf("the schema accepts: %s", b.name)
		}
	}
}

func TestAlertSchemaAgreesWithTheType(t *testing.T) {
	s := compile(t, alertSchema)
	a := Alert{
		ID: "a1", Kind: "score", Source: "s", EventID: "e", Model: "m", ClassIndex: 3,
		Labels: map[string]string{"tenant": "acme"}, Severity: SeverityWarn,
		Reason: "class_threshold", Measurement: ClassGap, Count: 1, Detail: "d", EventTime: time.Now(), FiredAt: time.Now(),
		Receipt: Receipt{Deviations: []string{"x"}},
	}
	_, payload, err := EncodeAlert(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate(t, s, payload); err != nil {
		t.Error(err)
	}
	for _, broken := range []string{`"severity":"warn"`, `"measurement":"class_gap"`, `"id":"a1","kind"`,
		`"specversion":"1.0"`} {
		if !strings.Contains(string(payload), broken) {
			t.Fatalf("no %s in %s", broken, payload)
		}
		name := strings.Split(broken, `"`)[1]
		if err := validate(t, s, []byte(strings.Replace(string(payload), `"`+name+`":`, `"x`+name+`":`, -1))); err == nil {
			t.Errorf("the schema accepts an alert without %s", name)
		}
	}
}

// TestEveryAlertFitsTheSchema encodes alerts of every kind of value and a full one, which gives every field.
func TestEveryAlertFitsTheSchema(t *testing.T) {
	s := compile(t, alertSchema)
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	texts := []string{"", "a", "é😀", "\u2028", `"<&>"`, strings.Repeat("x", 300)}
	var fill func(v reflect.Value, full bool)
	fill = func(v reflect.Value, full bool) {
		switch v.Kind() {
		case reflect.Struct:
			if v.Type() == reflect.TypeFor[time.Time]() {
				v.Set(reflect.ValueOf(time.Unix(random.Int64N(4e9), random.Int64N(1e9))))
				return
			}
			for i := range v.NumField() {
				fill(v.Field(i), full)
			}
		case reflect.String:
			v.SetString(texts[random.IntN(len(texts))])
		case reflect.Int, reflect.Int64:
			v.SetInt(1 + random.Int64N(1<<40))
		case reflect.Uint64:
			v.SetUint(random.Uint64())
		case reflect.Float64:
			v.SetFloat(random.NormFloat64() * math.Pow(10, float64(random.IntN(600)-300)))
		case reflect.Bool:
			v.SetBool(true)
		case reflect.Map:
			if full || random.IntN(2) == 0 {
				v.Set(reflect.ValueOf(map[string]string{"tenant": "acme"}))
			}
		case reflect.Pointer: // a number between 0 and 1, or none
			if full || random.IntN(2) == 0 {
				v.Set(reflect.ValueOf(new(random.Float64())))
			}
		case reflect.Slice:
			if full || random.IntN(2) == 0 {
				v.Set(reflect.ValueOf([]string{"sampler: euler was replaced by ddim"}))
			}
		default:
			t.Fatalf("a field of kind %s", v.Kind())
		}
	}
	for i := range 2000 {
		var a Alert
		fill(reflect.ValueOf(&a).Elem(), i == 0)
		a.ID, a.Severity = "a1", []Severity{SeverityWarn, SeverityCritical}[random.IntN(2)]
		a.Measurement = append(MeasurementNames(), "")[random.IntN(len(MeasurementNames())+1)]
		if random.IntN(4) == 0 {
			a.ClassIndex = -1
		}
		if i == 0 {
			a.Receipt.NoiseDtype, a.Receipt.LatentSHA256 = "float16", "0"
			a.Detail, a.EventID, a.TraceParent = "d", "e", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
		}
		_, payload, err := EncodeAlert(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate(t, s, payload); err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, payload)
		}
		if i > 0 {
			continue
		}
		var envelope map[string]any
		if err := json.Unmarshal(payload, &envelope); err != nil {
			t.Fatal(err)
		}
		data := envelope["data"].(map[string]any)
		for at, object := range map[string]map[string]any{"": envelope, "alert": data,
			"receipt": data["receipt"].(map[string]any)} {
			for _, name := range properties(t, alertSchema, at) {
				if _, given := object[name]; !given {
					t.Errorf("no alert gives the field %s %s of the schema", at, name)
				}
			}
		}
	}
}

// properties returns the names of the members that a schema names, at its top or in one of its definitions.
func properties(t *testing.T, file, definition string) []string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	type object struct {
		Properties map[string]any
		Defs       map[string]struct{ Properties map[string]any } `json:"$defs"`
	}
	var doc object
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	if definition == "" {
		return sortedNames(doc.Properties)
	}
	return sortedNames(doc.Defs[definition].Properties)
}

func TestReviewSchemaAgreesWithTheType(t *testing.T) {
	s := compile(t, reviewSchema)
	for _, r := range []Review{
		{ReviewID: "r1", AlertID: "a1", Version: 2, State: ReviewResolved, Verdict: VerdictConfirmed, Reviewer: "ada",
			Comment: "c", Source: "s", EventID: "e", EventTime: time.Now(), Model: "m", At: time.Now()},
		{ReviewID: "r1", Version: 3, State: ReviewOpen, Reviewer: "ada", Source: "s", EventID: "e", EventTime: time.Now(),
			Model: "m", At: time.Now()},
	} {
		_, payload, err := EncodeReview(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate(t, s, payload); err != nil {
			t.Error(err)
		}
	}
	_, payload, err := EncodeReview(Review{ReviewID: "r1", Version: 1, State: "closed", EventID: "e"})
	if err != nil {
		t.Fatal(err)
	}
	if err := validate(t, s, payload); err == nil {
		t.Error("the schema accepts an unknown state")
	}
}

// TestSchemasNameEveryField holds the documents' fields against the Go types', both ways, and every field's presence
// against omitempty.
func TestSchemasNameEveryField(t *testing.T) {
	for _, c := range []struct {
		file, at string
		value    any
	}{
		{eventSchema, "generation", Generation{}},
		{eventSchema, "sampler", Sampler{}},
		{eventSchema, "gpu", GPU{}},
		{eventSchema, "latent", Latent{}},
		{alertSchema, "alert", Alert{}},
		{alertSchema, "receipt", Receipt{}},
		{reviewSchema, "review", Review{}},
	} {
		text, err := os.ReadFile(c.file)
		if err != nil {
			t.Fatal(err)
		}
		var doc struct {
			Defs map[string]struct {
				Properties map[string]any
				Required   []string
			} `json:"$defs"`
		}
		if err := json.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		var names, required []string
		typ := reflect.TypeOf(c.value)
		for i := range typ.NumField() {
			name, options, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if name == "-" { // an attribute, not data
				continue
			}
			names = append(names, name)
			// A pointer without omitempty is null if there is no value; messages of older versions lack it.
			if options != "omitempty" && typ.Field(i).Type.Kind() != reflect.Pointer {
				required = append(required, name)
			}
		}
		slices.Sort(names)
		slices.Sort(required)
		wanted := doc.Defs[c.at]
		slices.Sort(wanted.Required)
		if got := sortedNames(wanted.Properties); !slices.Equal(got, names) {
			t.Errorf("%s %s: fields\n%v, the type has\n%v", c.file, c.at, got, names)
		}
		if !slices.Equal(wanted.Required, required) {
			t.Errorf("%s %s: required\n%v, the type has\n%v", c.file, c.at, wanted.Required, required)
		}
	}
}

func TestAsyncAPI(t *testing.T) {
	text, err := os.ReadFile("asyncapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := yaml.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	if doc["asyncapi"] != "3.0.0" {
		t.Errorf("version %v", doc["asyncapi"])
	}
	at := func(path ...string) any {
		t.Helper()
		v, err := follow(doc, path)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	// Every reference leads somewhere; one to a schema compiles.
	references := 0
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok {
				references++
				if path, inside := strings.CutPrefix(ref, "#/"); inside {
					if _, err := follow(doc, strings.Split(path, "/")); err != nil {
						t.Errorf("%s: %v", ref, err)
					}
				} else {
					compile(t, filepath.FromSlash(ref))
				}
			}
			for _, child := range v {
				walk(child)
			}
		case []any:
			for _, child := range v {
				walk(child)
			}
		}
	}
	walk(doc)
	if references < 8 {
		t.Errorf("only %d references", references)
	}
	// Addresses and names are those of the code.
	if got, want := at("channels", "generationRequested", "address"), SubjectGeneration("{model}"); got != want {
		t.Errorf("address %v, the code has %s", got, want)
	}
	alert := strings.NewReplacer(".warn", ".{severity}", ".7", ".{class}").Replace(AlertSubject(Alert{Model: "{model}",
		Severity: SeverityWarn, ClassIndex: 7}))
	if got := at("channels", "uncertaintyAlert", "address"); got != alert {
		t.Errorf("address %v, the code has %s", got, alert)
	}
	if got, want := at("channels", "uncertaintyReview", "address"), ReviewSubject(Review{Model: "{model}"}); got != want {
		t.Errorf("address %v, the code has %s", got, want)
	}
	for name, want := range map[string]string{"generationRequested": TypeGenerationRequested,
		"generationRequestedBinary": TypeGenerationRequested, "uncertaintyAlert": TypeUncertaintyAlert,
		"uncertaintyReview": TypeReview} {
		if got := at("components", "messages", name, "name"); got != want {
			t.Errorf("message %s is named %v, the code has %s", name, got, want)
		}
	}
	for name, address := range map[string]string{"generationRequested": "model",
		"uncertaintyAlert": "class,model,severity", "uncertaintyReview": "model"} {
		parameters := at("channels", name, "parameters").(map[string]any)
		if got := strings.Join(sortedNames(parameters), ","); got != address {
			t.Errorf("parameters of %s: %s", name, got)
		}
	}
	if got := fmt.Sprint(at("channels", "uncertaintyAlert", "parameters", "severity",
		"enum")); got != fmt.Sprint([]Severity{SeverityWarn, SeverityCritical}) {
		t.Errorf("severities %s", got)
	}
	for name, want := range map[string]string{"receiveGeneration": "receive", "sendAlert": "send", "sendReview": "send"} {
		if got := at("operations", name, "action"); got != want {
			t.Errorf("operation %s: %v", name, got)
		}
	}
	// Headers of real messages fit the document.
	binary, _ := binaryMode(t, valid())
	own, _, err := Encode(validEvent)
	if err != nil {
		t.Fatal(err)
	}
	for name, header := range map[string]map[string][]string{"generationRequestedBinary": binary,
		"generationRequested": own} {
		flat := map[string]any{}
		for n, values := range header {
			if strings.HasPrefix(n, "Ce-") {
				n = strings.ToLower(n)
			}
			flat[n] = values[0]
		}
		c := jsonschema.NewCompiler()
		c.AssertFormat()
		if err := c.AddResource("headers.json", at("components", "messages", name, "headers")); err != nil {
			t.Fatal(err)
		}
		headers, err := c.Compile("headers.json")
		if err != nil {
			t.Fatal(err)
		}
		if err := headers.Validate(flat); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		delete(flat, "ce-id")
		if name == "generationRequestedBinary" && headers.Validate(flat) == nil {
			t.Error("the document takes a message in binary mode without ce-id")
		}
	}
	if got := at("components", "messages", "generationRequested", "contentType"); got != contentTypeStructured {
		t.Errorf("content type %v", got)
	}
}

func follow(v any, path []string) (any, error) {
	for i, name := range path {
		fields, ok := v.(map[string]any)
		if !ok || fields[name] == nil {
			return nil, fmt.Errorf("nothing at %s", strings.Join(path[:i+1], "/"))
		}
		v = fields[name]
	}
	return v, nil
}

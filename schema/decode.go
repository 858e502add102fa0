package schema

import (
	"cmp"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/decuwatch/decuwatch/internal/modelname"
)

// Bounds of the event. They are part of the format: a producer that keeps them is never refused.
const (
	MaxPayload     = 64 << 10 // bytes of a message's payload
	MaxSource      = 512      // characters, which are ASCII in a URI
	MaxID          = 256      // bytes: 256 ASCII characters, or 64 characters of any kind
	MaxAttributes  = 27       // members of the CloudEvent: the format's 10, data, and 16 more
	MaxAttribute   = 2048     // characters of any attribute without a bound of its own
	MaxClasses     = 100_000  // a class index is below it
	MaxClassLabel  = 128      // characters
	MaxSamplerName = 128      // characters
	MaxSteps       = 1000
	MaxGuidance    = 30.0
	MaxLabels      = 16
	MaxLabelValue  = 128    // characters
	MaxBatchIndex  = 65_535 // of an image among those drawn together
	MaxSMs         = 4096   // of a GPU
	MinThreads     = 256    // of a multiprocessor of a GPU
	MaxThreads     = 8192
	MaxClockAhead  = 24 * time.Hour // of an event's time before the time when the stream stored its message
)

// bound is what a field may hold: a number from least to most, or a text of at most length characters.
type bound struct {
	least, most json.Number
	length      int
}

// bounds are the bounds of the event's fields by path. An attribute without a length of its own has [MaxAttribute].
var bounds = map[string]bound{
	"source":                      {length: MaxSource},
	"id":                          {length: MaxID},
	"time":                        {length: 64},
	"data.class":                  {least: "0", most: number(MaxClasses - 1)},
	"data.seed":                   {least: "0", most: "18446744073709551615"},
	"data.noise_offset":           {least: "0", most: "18446744073709551612"},
	"data.gpu.sms":                {least: "1", most: number(MaxSMs)},
	"data.gpu.threads_per_sm":     {least: number(MinThreads), most: number(MaxThreads)},
	"data.batch_index":            {least: "0", most: number(MaxBatchIndex)},
	"data.latent.step":            {least: "0", most: number(MaxSteps - 1)},
	"data.latent.timestep":        {least: "0", most: "100000"},
	"data.batch_size":             {least: "1", most: number(MaxBatchIndex + 1)},
	"data.sampler.steps":          {least: "1", most: number(MaxSteps)},
	"data.sampler.guidance_scale": {least: "0", most: number(MaxGuidance)},
	"data.sampler.eta":            {least: "0", most: "1"},
}

func number(v float64) json.Number { return json.Number(strconv.FormatFloat(v, 'f', -1, 64)) }

const contentTypeStructured = "application/cloudevents+json"

// The JSON Schema repeats these patterns.
var (
	namePattern      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$`)
	extensionPattern = regexp.MustCompile(`^[a-z0-9]{1,20}$`)
	jsonMediaPattern = regexp.MustCompile(`(?i)^application/json *(; *charset=("utf-8"|utf-8) *)?$`)
	tracePattern     = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)
	timePattern      = regexp.MustCompile(`^(20[2-9][0-9]-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}:)([0-9]{2})` +
		`(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})$`)
)

// noiseDtypes are the number types in which a producer may have drawn the first latent.
var noiseDtypes = []string{"float16", "bfloat16", "float32", "float64"}

// Invalid is the error for an event that breaks the format. Retrying will not help.
// The text names the field and what the field must be, for the producer.
type Invalid struct {
	Field  string // path of the field: "id", "data.sampler.steps"; "payload" if no field can be named
	Reason string // what is wrong and the bound
}

// Error returns "field: reason".
func (e *Invalid) Error() string { return e.Field + ": " + e.Reason }

func invalid(field, format string, args ...any) *Invalid {
	return &Invalid{Field: field, Reason: fmt.Sprintf(format, args...)}
}

// Decode reads a generation event from a NATS message, in structured mode or in the binary mode of the CloudEvents
// NATS binding. Every error is an *Invalid. Times are cut to microseconds, in UTC, as the database keeps them; a leap
// second becomes the second after it. A traceparent that is malformed is dropped, because tracing never decides
// whether an event is scored.
//
// The event's time is compared with this machine's clock. That is right for a producer that checks its own event. To
// read a stored message, call [DecodeAt].
func Decode(header map[string][]string, payload []byte) (Event, error) {
	return DecodeAt(header, payload, time.Now())
}

// DecodeAt is Decode for a message that the stream stored at the given time, by the server's clock. All readers of a
// message come to the same result, because their own clocks do not count.
func DecodeAt(header map[string][]string, payload []byte, stored time.Time) (Event, error) {
	e, err := decode(header, payload, stored)
	if err != nil {
		return Event{}, err // never a typed nil
	}
	return e, nil
}

func decode(header map[string][]string, payload []byte, stored time.Time) (Event, error) {
	if len(payload) > MaxPayload {
		return Event{}, invalid("payload", "has %d bytes, the most is %d", len(payload), MaxPayload)
	}
	attributes, data, err := envelope(header, payload)
	if err != nil {
		return Event{}, err
	}
	e, err := decodeEvent(attributes, data, stored)
	if e.TraceParent == "" {
		e.TraceParent, e.TraceState = traceHeaders(header)
	}
	return e, err
}

// envelope separates the attributes from the data, both as JSON values, for either mode.
func envelope(header map[string][]string, payload []byte) (attributes map[string]any, data any, err error) {
	contentType, headers, err := cloudEventsHeaders(header)
	if err != nil {
		return nil, nil, err
	}
	structured, err := isStructured(contentType, len(headers) > 0)
	if err != nil {
		return nil, nil, err
	}
	if !structured {
		data, err = parse(payload, "data")
		return headers, data, err
	}
	tree, err := parse(payload)
	if err != nil {
		return nil, nil, err
	}
	attributes, ok := tree.(map[string]any)
	if !ok {
		return nil, nil, invalid("payload", "must be a JSON object, a CloudEvent in structured mode")
	}
	if _, base64 := attributes["data_base64"]; base64 {
		return nil, nil, invalid("data_base64", "is not accepted, give data as a JSON object")
	}
	data, ok = attributes["data"]
	if !ok {
		return nil, nil, invalid("data", "is missing")
	}
	delete(attributes, "data")
	for _, name := range sortedNames(headers) {
		if v, ok := attributes[name]; !ok || v == nil || fmt.Sprint(v) != headers[name] {
			return nil, nil, invalid(pathName(name), "header ce-%s does not say what the payload says", clip(name))
		}
	}
	return attributes, data, nil
}

// attributeNames are the attributes that the format knows; any other is an extension.
var attributeNames = []string{
	"specversion", "type", "source", "id", "time", "datacontenttype", "subject", "dataschema",
}

func decodeEvent(attributes map[string]any, data any, stored time.Time) (Event, error) {
	if len(attributes)+1 > MaxAttributes {
		return Event{}, invalid("payload", "has %d members, the most is %d", len(attributes)+1, MaxAttributes)
	}
	r := reader{members: attributes}
	r.constant("specversion", "1.0")
	r.constant("type", TypeGenerationRequested)
	e := Event{Source: r.source(), ID: r.id(), Time: r.time(stored)}
	if media := r.attribute("datacontenttype", false); media != "" && !jsonMediaPattern.MatchString(media) {
		r.refuse("datacontenttype", "%s must be application/json", quote(media))
	}
	r.attribute("subject", false)
	r.attribute("dataschema", false)
	r.extensions()
	if s, ok := attributes["traceparent"].(string); ok && isTraceParent(s) {
		e.TraceParent = s
		if s, ok := attributes["tracestate"].(string); ok && len(s) <= 512 {
			e.TraceState = s
		}
	}
	if r.err != nil {
		return e, r.err
	}
	var err error
	e.Data, err = decodeGeneration(data)
	return e, err
}

func decodeGeneration(v any) (Generation, error) {
	r := newReader(v, "data", "model", "class", "seed", "noise", "noise_dtype", "noise_offset", "gpu", "batch_index",
		"batch_size", "latent", "sampler", "labels")
	g := Generation{
		Model:       r.model(),
		Class:       r.class(),
		Seed:        r.integer("seed"),
		Noise:       r.choice("noise", namePattern.MatchString, "the name of a generator: torch-cpu, torch-cuda, decuwatch"),
		NoiseDtype:  r.choice("noise_dtype", isNoiseDtype, "one of "+strings.Join(noiseDtypes, ", ")),
		NoiseOffset: r.noiseOffset(),
		GPU:         r.gpu(),
		BatchIndex:  r.batchIndex(),
		BatchSize:   r.batchSize(),
		Latent:      r.latent(),
		Sampler:     r.sampler(),
		Labels:      r.labels(),
	}
	return g, r.err
}

// reader reads the members of one object. It keeps the first error; what it returns after an error means nothing.
type reader struct {
	at      string // path of the object, "" for the event
	members map[string]any
	err     error
}

// newReader returns a reader of the object v, which has no other members than the named ones.
func newReader(v any, at string, names ...string) *reader {
	r := &reader{at: at}
	var ok bool
	if r.members, ok = v.(map[string]any); !ok {
		r.err = invalid(at, "must be an object")
	}
	for _, name := range sortedNames(r.members) {
		if !slices.Contains(names, name) {
			r.refuse(pathName(name), "is not a field of the format (known: %s)", strings.Join(names, ", "))
		}
	}
	return r
}

func (r *reader) path(name string) string {
	if r.at == "" {
		return name
	}
	return r.at + "." + name
}

func (r *reader) refuse(name, format string, args ...any) {
	if r.err == nil {
		r.err = invalid(r.path(name), format, args...)
	}
}

// has reports whether the object has the member, and there is no error yet.
func (r *reader) has(name string) bool {
	_, ok := r.members[name]
	return ok && r.err == nil
}

// required returns the member of a JSON type, which must be there.
func required[T any](r *reader, name, kind string) (v T) {
	if !r.has(name) {
		r.refuse(name, "is missing")
		return v
	}
	v, ok := r.members[name].(T)
	if !ok {
		r.refuse(name, "must be a %s", kind)
	}
	return v
}

// attribute returns a text of the event's envelope. As in the JSON format of CloudEvents, null means that the
// attribute is absent.
func (r *reader) attribute(name string, must bool) string {
	v := r.members[name]
	if v == nil {
		if must {
			r.refuse(name, "is missing")
		}
		return ""
	}
	s, ok := v.(string)
	if !ok {
		r.refuse(name, "must be a string")
	}
	most := cmp.Or(bounds[name].length, MaxAttribute)
	if n := utf8.RuneCountInString(s); n < 1 || n > most {
		r.refuse(name, "has %d characters, must have 1 to %d", n, most)
	}
	if !printable(s) {
		r.refuse(name, "holds a control character")
	}
	return s
}

func (r *reader) constant(name, want string) {
	if s := r.attribute(name, true); s != want {
		r.refuse(name, "%s must be %s", quote(s), want)
	}
}

func (r *reader) source() string {
	s := r.attribute("source", true)
	if !isURIReference(s) {
		r.refuse("source", "%s is not a URI reference as in RFC 3986", quote(s))
	}
	return s
}

func (r *reader) id() string {
	s := r.attribute("id", true)
	if len(s) > MaxID || utf8.RuneCountInString(s) > MaxID/utf8.UTFMax && !isASCII(s) {
		r.refuse("id", "must have at most %d ASCII characters, or %d of any kind", MaxID, MaxID/utf8.UTFMax)
	}
	if strings.Trim(s, " ") != s {
		r.refuse("id", "%s begins or ends with a space", quote(s))
	}
	return s
}

func (r *reader) time(stored time.Time) time.Time {
	s := r.attribute("time", true)
	t, ok := parseTime(s)
	if !ok {
		r.refuse("time", "%s is not a time as in RFC 3339, from 2020 to 2099", quote(s))
	}
	if t.After(stored.Add(MaxClockAhead)) {
		r.refuse("time", "%s is more than %s ahead of the time when the stream stored the message", s, MaxClockAhead)
	}
	return t
}

func (r *reader) extensions() {
	for _, name := range sortedNames(r.members) {
		if slices.Contains(attributeNames, name) || r.err != nil {
			continue
		}
		r.err = checkExtension(name, r.members[name])
	}
}

func (r *reader) model() string {
	s := required[string](r, "model", "string")
	if !modelname.Valid(s) {
		r.refuse("model", "%s must be %s", quote(s), modelname.Rule)
	}
	return s
}

func (r *reader) class() Class {
	switch v := r.members["class"].(type) {
	case nil:
		r.refuse("class", "is missing")
	case json.Number:
		return ClassIndex(int(r.integer("class"))) //nolint:gosec // below MaxClasses
	case string:
		if n := utf8.RuneCountInString(v); n < 1 || n > MaxClassLabel || !printable(v) {
			r.refuse("class", "must be a label of 1 to %d printable characters", MaxClassLabel)
		}
		return ClassLabel(v)
	default:
		r.refuse("class", "must be an index (integer) or a label (string)")
	}
	return Class{}
}

func (r *reader) integer(name string) uint64 { return within(r, name, integer) }

func (r *reader) real(name string) float64 { return within(r, name, real) }

// within returns a number that must be there, within its bounds.
func within[T any](
	r *reader, name string, read func(n json.Number, at string, least, most json.Number) (T, error),
) (v T) {
	n := required[json.Number](r, name, "number")
	if b := bounds[r.path(name)]; r.err == nil {
		v, r.err = read(n, r.path(name), b.least, b.most)
	}
	return v
}

// choice returns a text that may be absent.
func (r *reader) choice(name string, valid func(string) bool, must string) string {
	s, _ := r.members[name].(string)
	if r.has(name) && !valid(s) {
		r.refuse(name, "must be %s", must)
	}
	return s
}

func isNoiseDtype(s string) bool { return slices.Contains(noiseDtypes, s) }

func (r *reader) batchIndex() *int {
	if !r.has("batch_index") {
		return nil
	}
	return new(int(r.integer("batch_index"))) //nolint:gosec // at most MaxBatchIndex
}

func (r *reader) batchSize() int {
	if !r.has("batch_size") {
		return 0
	}
	size := int(r.integer("batch_size")) //nolint:gosec // at most MaxBatchIndex + 1
	if !r.has("batch_index") {
		r.refuse("batch_size", "needs batch_index")
	}
	return size
}

// ofCUDA refuses a member that only torch-cuda has, unless the event names that generator.
func (r *reader) ofCUDA(name string) {
	if r.members["noise"] != "torch-cuda" {
		r.refuse(name, "needs noise torch-cuda")
	}
}

func (r *reader) noiseOffset() uint64 {
	if !r.has("noise_offset") {
		return 0
	}
	offset := r.integer("noise_offset")
	if offset%4 != 0 {
		r.refuse("noise_offset", "is %d, must be a multiple of 4", offset)
	}
	r.ofCUDA("noise_offset")
	return offset
}

func (r *reader) gpu() *GPU {
	if !r.has("gpu") {
		return nil
	}
	f := newReader(r.members["gpu"], r.path("gpu"), "sms", "threads_per_sm")
	g := GPU{SMs: int(f.integer("sms")), ThreadsPerSM: int(f.integer("threads_per_sm"))} //nolint:gosec // bounded
	r.err = f.err
	r.ofCUDA("gpu")
	return &g
}

func (r *reader) sampler() *Sampler {
	if !r.has("sampler") {
		return nil
	}
	f := newReader(r.members["sampler"], r.path("sampler"), "name", "steps", "guidance_scale", "eta")
	s := Sampler{
		Name:          f.samplerName(),
		Steps:         int(f.integer("steps")), //nolint:gosec // at most MaxSteps
		GuidanceScale: f.real("guidance_scale"),
		Eta:           f.real("eta"),
	}
	r.err = f.err
	return &s
}

func (r *reader) samplerName() string {
	s := required[string](r, "name", "string")
	if n := utf8.RuneCountInString(s); n < 1 || n > MaxSamplerName || !printable(s) {
		r.refuse("name", "must have 1 to %d printable characters", MaxSamplerName)
	}
	return s
}

func (r *reader) labels() map[string]string {
	if !r.has("labels") {
		return nil
	}
	members, ok := r.members["labels"].(map[string]any)
	if !ok {
		r.refuse("labels", "must be an object of strings")
	}
	if len(members) > MaxLabels {
		r.refuse("labels", "has %d labels, the most is %d", len(members), MaxLabels)
	}
	if r.err != nil || len(members) == 0 {
		return nil
	}
	labels := make(map[string]string, len(members))
	for _, name := range sortedNames(members) {
		if !namePattern.MatchString(name) {
			r.refuse("labels", "name %s must be 1 to 64 of A-Z a-z 0-9 _ . + -, beginning with a letter or digit", quote(name))
		}
		s, ok := members[name].(string)
		if !ok || utf8.RuneCountInString(s) > MaxLabelValue || !printable(s) {
			r.refuse("labels."+name, "must be a string of at most %d printable characters", MaxLabelValue)
		}
		labels[name] = s
	}
	return labels
}

// checkExtension returns an error if an extension attribute breaks the CloudEvents specification.
func checkExtension(name string, value any) error {
	if !extensionPattern.MatchString(name) {
		return invalid(pathName(name), "is not the name of a CloudEvents attribute (1 to 20 of a-z 0-9)")
	}
	switch v := value.(type) {
	case nil, bool:
		return nil
	case string:
		if n := utf8.RuneCountInString(v); n > MaxAttribute {
			return invalid(name, "has %d characters, the most is %d", n, MaxAttribute)
		}
		if !printable(v) {
			return invalid(name, "holds a control character")
		}
		return nil
	case json.Number:
		_, err := integer(v, name, "-2147483648", "2147483647")
		return err
	}
	return invalid(name, "must be a string, an integer or a boolean")
}

// isTraceParent reports whether s is a traceparent of W3C Trace Context whose version, trace and parent are valid.
func isTraceParent(s string) bool {
	return tracePattern.MatchString(s) && s[:2] != "ff" &&
		strings.Trim(s[3:35], "0") != "" && strings.Trim(s[36:52], "0") != ""
}

// parseTime reads a time of RFC 3339 in the years 2020 to 2099, as they are written, and cuts it to microseconds. A
// leap second becomes the second after it.
func parseTime(s string) (time.Time, bool) {
	m := timePattern.FindStringSubmatch(s)
	if m == nil {
		return time.Time{}, false
	}
	date, minute, second, fraction, zone := m[1], m[2], m[3], m[4], strings.ToUpper(m[5])
	leap := second == "60"
	if leap {
		second = "59"
	}
	t, err := time.Parse(time.RFC3339Nano, date+"T"+minute+second+fraction+zone)
	if err != nil || zone != "Z" && (zone[1:3] > "23" || zone[4:] > "59") { // Parse takes 24 and 60
		return time.Time{}, false
	}
	t = t.UTC().Truncate(time.Microsecond)
	if leap {
		if t.Hour() != 23 || t.Minute() != 59 {
			return time.Time{}, false
		}
		t = t.Add(time.Second)
	}
	return t, true
}

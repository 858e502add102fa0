package schema

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
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
	MaxLabelValue  = 128            // characters
	MaxBatchIndex  = 65_535         // of an image among those drawn together
	MaxClockAhead  = 24 * time.Hour // of an event's time before the time when the stream stored its message
	maxNesting     = 8
	maxReasonValue = 48 // bytes of an offending value that a reason repeats
)

const contentTypeStructured = "application/cloudevents+json"

// The JSON Schema repeats these patterns.
var (
	modelPattern     = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,63}$`)
	namePattern      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$`)
	extensionPattern = regexp.MustCompile(`^[a-z0-9]{1,20}$`)
	jsonMediaPattern = regexp.MustCompile(`(?i)^application/json *(; *charset=("utf-8"|utf-8) *)?$`)
	tracePattern     = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)
	timePattern      = regexp.MustCompile(`^(20[2-9][0-9]-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}:)([0-9]{2})(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})$`)
)

// noiseDtypes are the number types in which a producer may have drawn the first latent.
var noiseDtypes = []string{"float16", "bfloat16", "float32", "float64"}

// Invalid is the error for an event that breaks the format. It is permanent: the same message never becomes valid.
// The text names the field and what the field must be, for the producer.
type Invalid struct {
	Field  string // path of the field: "id", "data.sampler.steps"; "payload" where no field can be named
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
// The event's time is compared with this machine's clock. That is right for a producer that checks its own event; whoever
// reads a stored message calls [DecodeAt].
func Decode(header map[string][]string, payload []byte) (Event, error) {
	return DecodeAt(header, payload, time.Now())
}

// DecodeAt is Decode for a message that the stream stored at the given time, by the server's clock. Every reader of the
// message comes to the same result, whatever its own clock says.
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
	return decodeEvent(attributes, data, stored)
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

func decodeEvent(attributes map[string]any, data any, stored time.Time) (Event, error) {
	var e Event
	if len(attributes)+1 > MaxAttributes {
		return e, invalid("payload", "has %d members, the most is %d", len(attributes)+1, MaxAttributes)
	}
	// text takes an attribute out. A null stands for an attribute that is not there, as the JSON format has it.
	text := func(name string, required bool, most int) (string, error) {
		v, ok := attributes[name]
		delete(attributes, name)
		if !ok || v == nil {
			if required {
				return "", invalid(name, "is missing")
			}
			return "", nil
		}
		s, ok := v.(string)
		if !ok {
			return "", invalid(name, "must be a string")
		}
		if n := utf8.RuneCountInString(s); n < 1 || n > most {
			return "", invalid(name, "has %d characters, must have 1 to %d", n, most)
		}
		if !printable(s) {
			return "", invalid(name, "holds a control character")
		}
		return s, nil
	}

	version, err := text("specversion", true, MaxAttribute)
	if err != nil {
		return e, err
	}
	if version != "1.0" {
		return e, invalid("specversion", "%s must be 1.0", quote(version))
	}
	kind, err := text("type", true, MaxAttribute)
	if err != nil {
		return e, err
	}
	if kind != TypeGenerationRequested {
		return e, invalid("type", "%s must be %s", quote(kind), TypeGenerationRequested)
	}
	if e.Source, err = text("source", true, MaxSource); err != nil {
		return e, err
	}
	if !isURIReference(e.Source) {
		return e, invalid("source", "%s is not a URI reference as in RFC 3986", quote(e.Source))
	}
	if e.ID, err = text("id", true, MaxID); err != nil {
		return e, err
	}
	if len(e.ID) > MaxID || utf8.RuneCountInString(e.ID) > MaxID/utf8.UTFMax && !isASCII(e.ID) {
		return e, invalid("id", "must have at most %d ASCII characters, or %d of any kind", MaxID, MaxID/utf8.UTFMax)
	}
	if strings.Trim(e.ID, " ") != e.ID {
		return e, invalid("id", "%s begins or ends with a space", quote(e.ID))
	}
	stamp, err := text("time", true, 64)
	if err != nil {
		return e, err
	}
	var ok bool
	if e.Time, ok = parseTime(stamp); !ok {
		return e, invalid("time", "%s is not a time as in RFC 3339, from 2020 to 2099", quote(stamp))
	}
	if e.Time.After(stored.Add(MaxClockAhead)) {
		return e, invalid("time", "%s is more than %s ahead of the time when the stream stored the message", stamp, MaxClockAhead)
	}
	media, err := text("datacontenttype", false, MaxAttribute)
	if err != nil {
		return e, err
	}
	if media != "" && !jsonMediaPattern.MatchString(media) {
		return e, invalid("datacontenttype", "%s must be application/json", quote(media))
	}
	for _, ignored := range []string{"subject", "dataschema"} {
		if _, err := text(ignored, false, MaxAttribute); err != nil {
			return e, err
		}
	}
	for _, name := range sortedNames(attributes) {
		if err := checkExtension(name, attributes[name]); err != nil {
			return e, err
		}
	}
	if s, ok := attributes["traceparent"].(string); ok && isTraceParent(s) {
		e.TraceParent = s
		if s, ok := attributes["tracestate"].(string); ok && len(s) <= 512 {
			e.TraceState = s
		}
	}
	e.Data, err = decodeGeneration(data)
	return e, err
}

// checkExtension returns an error if an extension attribute breaks CloudEvents. Those that the format does not know
// are otherwise ignored.
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

func decodeGeneration(v any) (Generation, error) {
	var g Generation
	data, err := object(v, "data", "model", "class", "seed", "noise", "noise_dtype", "batch_index", "sampler", "labels")
	if err != nil {
		return g, err
	}
	if g.Model, err = requiredString(data, "model", "data.model"); err != nil {
		return g, err
	}
	if !modelPattern.MatchString(g.Model) {
		return g, invalid("data.model", "%s must be 1 to 64 of a-z 0-9 - _, beginning with a letter", quote(g.Model))
	}
	switch class := data["class"].(type) {
	case nil:
		return g, invalid("data.class", "is missing")
	case json.Number:
		i, err := integer(class, "data.class", "0", "99999")
		if err != nil {
			return g, err
		}
		g.Class = ClassIndex(int(i))
	case string:
		if n := utf8.RuneCountInString(class); n < 1 || n > MaxClassLabel || !printable(class) {
			return g, invalid("data.class", "must be a label of 1 to %d printable characters", MaxClassLabel)
		}
		g.Class = ClassLabel(class)
	default:
		return g, invalid("data.class", "must be an index (integer) or a label (string)")
	}
	seed, err := requiredNumber(data, "seed", "data.seed")
	if err != nil {
		return g, err
	}
	if g.Seed, err = integer(seed, "data.seed", "0", "18446744073709551615"); err != nil {
		return g, err
	}
	if noise, ok := data["noise"]; ok {
		s, ok := noise.(string)
		if !ok || !namePattern.MatchString(s) {
			return g, invalid("data.noise", "must be the name of a generator: torch-cpu, torch-cuda, decuwatch")
		}
		g.Noise = s
	}
	if dtype, ok := data["noise_dtype"]; ok {
		s, ok := dtype.(string)
		if !ok || !slices.Contains(noiseDtypes, s) {
			return g, invalid("data.noise_dtype", "must be one of %s", strings.Join(noiseDtypes, ", "))
		}
		g.NoiseDtype = s
	}
	if _, ok := data["batch_index"]; ok {
		n, err := requiredNumber(data, "batch_index", "data.batch_index")
		if err != nil {
			return g, err
		}
		i, err := integer(n, "data.batch_index", "0", "65535")
		if err != nil {
			return g, err
		}
		index := int(i)
		g.BatchIndex = &index
	}
	if sampler, ok := data["sampler"]; ok {
		if g.Sampler, err = decodeSampler(sampler); err != nil {
			return g, err
		}
	}
	if labels, ok := data["labels"]; ok {
		if g.Labels, err = decodeLabels(labels); err != nil {
			return g, err
		}
	}
	return g, nil
}

func decodeSampler(v any) (*Sampler, error) {
	const at = "data.sampler"
	fields, err := object(v, at, "name", "steps", "guidance_scale", "eta")
	if err != nil {
		return nil, err
	}
	var s Sampler
	if s.Name, err = requiredString(fields, "name", at+".name"); err != nil {
		return nil, err
	}
	if n := utf8.RuneCountInString(s.Name); n < 1 || n > MaxSamplerName || !printable(s.Name) {
		return nil, invalid(at+".name", "must have 1 to %d printable characters", MaxSamplerName)
	}
	steps, err := requiredNumber(fields, "steps", at+".steps")
	if err != nil {
		return nil, err
	}
	n, err := integer(steps, at+".steps", "1", "1000")
	if err != nil {
		return nil, err
	}
	s.Steps = int(n)
	guidance, err := requiredNumber(fields, "guidance_scale", at+".guidance_scale")
	if err != nil {
		return nil, err
	}
	if s.GuidanceScale, err = real(guidance, at+".guidance_scale", "0", "30"); err != nil {
		return nil, err
	}
	eta, err := requiredNumber(fields, "eta", at+".eta")
	if err != nil {
		return nil, err
	}
	s.Eta, err = real(eta, at+".eta", "0", "1")
	return &s, err
}

func decodeLabels(v any) (map[string]string, error) {
	fields, ok := v.(map[string]any)
	if !ok {
		return nil, invalid("data.labels", "must be an object of strings")
	}
	if len(fields) > MaxLabels {
		return nil, invalid("data.labels", "has %d labels, the most is %d", len(fields), MaxLabels)
	}
	if len(fields) == 0 {
		return nil, nil
	}
	labels := make(map[string]string, len(fields))
	for _, name := range sortedNames(fields) {
		if !namePattern.MatchString(name) {
			return nil, invalid("data.labels", "name %s must be 1 to 64 of A-Z a-z 0-9 _ . + -, beginning with a letter or digit", quote(name))
		}
		s, ok := fields[name].(string)
		if !ok || utf8.RuneCountInString(s) > MaxLabelValue || !printable(s) {
			return nil, invalid("data.labels."+name, "must be a string of at most %d printable characters", MaxLabelValue)
		}
		labels[name] = s
	}
	return labels, nil
}

// object returns v as an object that has no other fields than the named ones.
func object(v any, at string, names ...string) (map[string]any, error) {
	fields, ok := v.(map[string]any)
	if !ok {
		return nil, invalid(at, "must be an object")
	}
	for _, name := range sortedNames(fields) {
		if !slices.Contains(names, name) {
			return nil, invalid(at+"."+pathName(name), "is not a field of the format (known: %s)", strings.Join(names, ", "))
		}
	}
	return fields, nil
}

func requiredString(fields map[string]any, name, at string) (string, error) {
	v, ok := fields[name]
	if !ok {
		return "", invalid(at, "is missing")
	}
	s, ok := v.(string)
	if !ok {
		return "", invalid(at, "must be a string")
	}
	return s, nil
}

func requiredNumber(fields map[string]any, name, at string) (json.Number, error) {
	v, ok := fields[name]
	if !ok {
		return "", invalid(at, "is missing")
	}
	n, ok := v.(json.Number)
	if !ok {
		return "", invalid(at, "must be a number")
	}
	return n, nil
}

// parse reads one JSON value strictly, as I-JSON (RFC 7493) has it: no second value, no name twice in an object, no
// surrogate without its other half, no noncharacter, valid UTF-8. Nesting is bounded.
// Where the syntax is broken the error names the field it broke in. Numbers stay literal.
func parse(payload []byte, at ...string) (any, error) {
	where := func() string {
		if len(at) == 0 {
			return "payload"
		}
		return strings.Join(at, ".")
	}
	if !utf8.Valid(payload) {
		return nil, invalid(where(), "is not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(payload))
	dec.UseNumber()
	var value func(depth int) (any, error)
	broken := func(err error) error {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return invalid(where(), "is not JSON: ends too early")
		}
		return invalid(where(), "is not JSON: %s at byte %d", err, dec.InputOffset())
	}
	next := func() (json.Token, error) {
		begin := dec.InputOffset()
		token, err := dec.Token()
		if err != nil {
			return nil, broken(err)
		}
		s, ok := token.(string)
		if ok && (loneSurrogate(payload[begin:dec.InputOffset()]) || strings.ContainsFunc(s, noncharacter)) {
			return nil, invalid(where(), "holds half of a surrogate pair or a noncharacter, which I-JSON forbids")
		}
		return token, nil
	}
	value = func(depth int) (any, error) {
		if depth > maxNesting {
			return nil, invalid(where(), "is nested deeper than %d levels", maxNesting)
		}
		token, err := next()
		if err != nil {
			return nil, err
		}
		delim, ok := token.(json.Delim)
		if !ok {
			return token, nil
		}
		if delim == '[' {
			var list []any
			for dec.More() {
				v, err := value(depth + 1)
				if err != nil {
					return nil, err
				}
				list = append(list, v)
			}
			_, err := dec.Token()
			if err != nil {
				return nil, broken(err)
			}
			return list, nil
		}
		fields := map[string]any{}
		for dec.More() {
			token, err := next()
			if err != nil {
				return nil, err
			}
			name, ok := token.(string)
			if !ok {
				return nil, invalid(where(), "is not JSON: a field's name must be a string")
			}
			at = append(at, pathName(name))
			if _, twice := fields[name]; twice {
				return nil, invalid(where(), "is given twice")
			}
			if fields[name], err = value(depth + 1); err != nil {
				return nil, err
			}
			at = at[:len(at)-1]
		}
		if _, err := dec.Token(); err != nil {
			return nil, broken(err)
		}
		return fields, nil
	}
	v, err := value(1)
	if err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, invalid(where(), "holds more than one JSON value")
	}
	if !json.Valid(payload) {
		return nil, invalid(where(), "is not JSON")
	}
	return v, nil
}

// Digest returns the SHA-256 of a message's payload and its CloudEvents headers, lower-case hex. It tells a
// redelivery from an identifier that was used for two different events; order and case of header names, and headers
// that belong to the transport, do not count.
func Digest(header map[string][]string, payload []byte) string {
	type pair struct{ name, value string }
	var pairs []pair
	for name, values := range header {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "ce-") || lower == "content-type" {
			for _, value := range values {
				pairs = append(pairs, pair{lower, value})
			}
		}
	}
	slices.SortFunc(pairs, func(a, b pair) int {
		if c := strings.Compare(a.name, b.name); c != 0 {
			return c
		}
		return strings.Compare(a.value, b.value)
	})
	h := sha256.New()
	for _, p := range pairs {
		fmt.Fprintf(h, "%d:%s=%d:%s\n", len(p.name), p.name, len(p.value), p.value)
	}
	h.Write([]byte{0})
	h.Write(payload)
	return hex.EncodeToString(h.Sum(nil))
}

func printable(s string) bool {
	unfit := func(r rune) bool { return unicode.IsControl(r) || noncharacter(r) }
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unfit)
}

// noncharacter reports whether Unicode reserves a code point for use inside programs.
func noncharacter(r rune) bool { return r >= 0xfdd0 && r <= 0xfdef || r&0xfffe == 0xfffe }

// loneSurrogate reports whether a JSON string, as it is written, holds the escape of half a surrogate pair.
func loneSurrogate(raw []byte) bool {
	escape := func(i int) rune { // the code unit of the escape at i, or -1
		if i+6 > len(raw) || raw[i] != '\\' || raw[i+1] != 'u' {
			return -1
		}
		u, err := strconv.ParseUint(string(raw[i+2:i+6]), 16, 16)
		if err != nil {
			return -1
		}
		return rune(u)
	}
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			continue
		}
		switch r := escape(i); {
		case !utf16.IsSurrogate(r):
			i++ // past the escaped character
		case utf16.DecodeRune(r, escape(i+6)) == unicode.ReplacementChar:
			return true
		default:
			i += 11
		}
	}
	return false
}

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII })
}

// clip shortens a producer's text for a reason and keeps control characters out of it.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
	if len(s) <= maxReasonValue {
		return s
	}
	cut := maxReasonValue
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "..."
}

// pathName writes a producer's field name as part of a path.
func pathName(s string) string {
	if s == "" {
		return `""`
	}
	return clip(s)
}

func quote(s string) string { return strconv.Quote(clip(s)) }

func sortedNames[V any](m map[string]V) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

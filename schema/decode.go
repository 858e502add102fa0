package schema

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of the event. They are part of the format: a producer that keeps them is never refused.
const (
	MaxPayload     = 64 << 10 // bytes of a message's payload
	MaxSource      = 512      // bytes
	MaxID          = 256      // bytes
	MaxExtensions  = 16       // CloudEvents extension attributes beside traceparent and tracestate
	MaxAttribute   = 2048     // bytes of any attribute without a bound of its own
	MaxClasses     = 100_000  // a class index is below it
	MaxClassLabel  = 128      // characters
	MaxSteps       = 1000
	MaxGuidance    = 30.0
	MaxLabels      = 16
	MaxLabelValue  = 128            // characters
	MaxClockAhead  = 24 * time.Hour // of an event's time before the time when the stream stored its message
	maxNesting     = 8
	maxReasonValue = 48 // bytes of an offending value that a reason repeats
)

// Oldest is the earliest time that an event may carry.
var Oldest = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

const contentTypeStructured = "application/cloudevents+json"

var (
	modelPattern     = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,63}$`)
	namePattern      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$`)
	extensionPattern = regexp.MustCompile(`^[a-z0-9]{1,20}$`)
	tracePattern     = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)
)

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

// Decode reads a generation event from a NATS message: structured mode (content type application/cloudevents+json,
// or no content type and no ce- header) or binary mode (attributes in ce- headers, data in the payload). Header names
// are compared without case. Every error is an *Invalid. Times are cut to microseconds, in UTC, as the database keeps
// them. A traceparent that is malformed is dropped, for tracing never decides whether an event is scored.
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
	contentType, binary := "", false
	attributes = map[string]any{}
	for _, name := range sortedNames(header) {
		values := header[name]
		lower := strings.ToLower(name)
		attribute, ce := strings.CutPrefix(lower, "ce-")
		if !ce && lower != "content-type" {
			continue
		}
		if len(values) != 1 {
			return nil, nil, invalid(lower, "header is given %d times, must be given once", len(values))
		}
		if !ce {
			contentType = values[0]
			continue
		}
		binary = true
		if _, twice := attributes[attribute]; twice {
			return nil, nil, invalid(attribute, "header ce-%s is given twice", attribute)
		}
		value, err := url.PathUnescape(values[0])
		if err != nil {
			return nil, nil, invalid(attribute, "header is not percent-encoded as CloudEvents asks")
		}
		attributes[attribute] = value
	}
	media := ""
	if contentType != "" {
		if media, _, err = mime.ParseMediaType(contentType); err != nil {
			return nil, nil, invalid("content-type", "%s is not a media type", quote(contentType))
		}
	}
	if media == contentTypeStructured || (media == "" && !binary) {
		tree, err := parse(payload)
		if err != nil {
			return nil, nil, err
		}
		attributes, ok := tree.(map[string]any)
		if !ok {
			return nil, nil, invalid("payload", "must be a JSON object, a CloudEvent in structured mode")
		}
		data, ok := attributes["data"]
		if _, base64 := attributes["data_base64"]; base64 {
			return nil, nil, invalid("data_base64", "is not accepted, give data as a JSON object")
		}
		if !ok {
			return nil, nil, invalid("data", "is missing")
		}
		delete(attributes, "data")
		return attributes, data, nil
	}
	if !binary {
		return nil, nil, invalid("content-type", "%s is not %s, and there are no ce- headers", quote(media), contentTypeStructured)
	}
	if media != "" && media != "application/json" {
		return nil, nil, invalid("content-type", "%s must be application/json in binary mode", quote(media))
	}
	data, err = parse(payload, "data")
	return attributes, data, err
}

func decodeEvent(attributes map[string]any, data any, stored time.Time) (Event, error) {
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
		if s == "" || len(s) > most {
			return "", invalid(name, "has %d bytes, must have 1 to %d", len(s), most)
		}
		if !printable(s) {
			return "", invalid(name, "holds a control character")
		}
		return s, nil
	}

	var e Event
	version, err := text("specversion", true, 16)
	if err != nil {
		return e, err
	}
	if version != "1.0" {
		return e, invalid("specversion", "%s must be 1.0", quote(version))
	}
	kind, err := text("type", true, 256)
	if err != nil {
		return e, err
	}
	if kind != TypeGenerationRequested {
		return e, invalid("type", "%s must be %s", quote(kind), TypeGenerationRequested)
	}
	if e.Source, err = text("source", true, MaxSource); err != nil {
		return e, err
	}
	if _, err := url.Parse(e.Source); err != nil || strings.ContainsRune(e.Source, ' ') {
		return e, invalid("source", "%s is not a URI reference", quote(e.Source))
	}
	if e.ID, err = text("id", true, MaxID); err != nil {
		return e, err
	}
	stamp, err := text("time", true, 64)
	if err != nil {
		return e, err
	}
	if e.Time, err = time.Parse(time.RFC3339Nano, stamp); err != nil {
		return e, invalid("time", "%s is not a time as in RFC 3339", quote(stamp))
	}
	e.Time = e.Time.UTC().Truncate(time.Microsecond)
	if e.Time.Before(Oldest) {
		return e, invalid("time", "%s is before %s", stamp, Oldest.Format(time.DateOnly))
	}
	if e.Time.After(stored.Add(MaxClockAhead)) {
		return e, invalid("time", "%s is more than %s ahead of the time when the stream stored the message", stamp, MaxClockAhead)
	}
	media, err := text("datacontenttype", false, 256)
	if err != nil {
		return e, err
	}
	if media != "" {
		if m, _, err := mime.ParseMediaType(media); err != nil || m != "application/json" {
			return e, invalid("datacontenttype", "%s must be application/json", quote(media))
		}
	}
	for _, ignored := range []string{"subject", "dataschema"} {
		if _, err := text(ignored, false, MaxAttribute); err != nil {
			return e, err
		}
	}
	if s, ok := attributes["traceparent"].(string); ok && tracePattern.MatchString(s) {
		e.TraceParent = s
		if s, ok := attributes["tracestate"].(string); ok && len(s) <= 512 && printable(s) {
			e.TraceState = s
		}
	}
	delete(attributes, "traceparent")
	delete(attributes, "tracestate")
	if len(attributes) > MaxExtensions {
		return e, invalid("extensions", "has %d extension attributes, the most is %d", len(attributes), MaxExtensions)
	}
	for _, name := range sortedNames(attributes) {
		if !extensionPattern.MatchString(name) {
			return e, invalid(pathName(name), "is not the name of a CloudEvents attribute (1 to 20 of a-z 0-9)")
		}
		switch v := attributes[name].(type) {
		case map[string]any, []any:
			return e, invalid(name, "must be a string, a number or a boolean")
		case string:
			if len(v) > MaxAttribute {
				return e, invalid(name, "has %d bytes, the most is %d", len(v), MaxAttribute)
			}
		}
	}
	e.Data, err = decodeGeneration(data)
	return e, err
}

func decodeGeneration(v any) (Generation, error) {
	var g Generation
	data, err := object(v, "data", "model", "class", "seed", "noise", "sampler", "labels")
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
		i, err := integer(class, "data.class", 0, MaxClasses-1)
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
	switch seed := data["seed"].(type) {
	case nil:
		return g, invalid("data.seed", "is missing")
	case json.Number:
		if g.Seed, err = strconv.ParseUint(seed.String(), 10, 64); err != nil {
			return g, invalid("data.seed", "%s must be an integer from 0 to %d", clip(seed.String()), uint64(math.MaxUint64))
		}
	default:
		return g, invalid("data.seed", "must be an integer from 0 to %d", uint64(math.MaxUint64))
	}
	if noise, ok := data["noise"]; ok {
		s, ok := noise.(string)
		if !ok || !namePattern.MatchString(s) {
			return g, invalid("data.noise", "must be the name of a generator: torch-cpu, torch-cuda, decuwatch")
		}
		g.Noise = s
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
	if !namePattern.MatchString(s.Name) {
		return nil, invalid(at+".name", "%s must be 1 to 64 of A-Z a-z 0-9 _ . + -", quote(s.Name))
	}
	steps, err := requiredNumber(fields, "steps", at+".steps")
	if err != nil {
		return nil, err
	}
	n, err := integer(steps, at+".steps", 1, MaxSteps)
	if err != nil {
		return nil, err
	}
	s.Steps = int(n)
	guidance, err := requiredNumber(fields, "guidance_scale", at+".guidance_scale")
	if err != nil {
		return nil, err
	}
	if s.GuidanceScale, err = real(guidance, at+".guidance_scale", 0, MaxGuidance); err != nil {
		return nil, err
	}
	eta, err := requiredNumber(fields, "eta", at+".eta")
	if err != nil {
		return nil, err
	}
	s.Eta, err = real(eta, at+".eta", 0, 1)
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

func integer(n json.Number, at string, least, most int64) (int64, error) {
	i, err := strconv.ParseInt(n.String(), 10, 64)
	if err != nil || i < least || i > most {
		return 0, invalid(at, "%s must be an integer from %d to %d", clip(n.String()), least, most)
	}
	return i, nil
}

func real(n json.Number, at string, least, most float64) (float64, error) {
	f, err := strconv.ParseFloat(n.String(), 64)
	if err != nil || !(f >= least && f <= most) {
		return 0, invalid(at, "%s must be a number from %g to %g", clip(n.String()), least, most)
	}
	return f, nil
}

// parse reads one JSON value strictly: no second value, no name twice in an object, nesting bounded, valid UTF-8.
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
	value = func(depth int) (any, error) {
		if depth > maxNesting {
			return nil, invalid(where(), "is nested deeper than %d levels", maxNesting)
		}
		token, err := dec.Token()
		if err != nil {
			return nil, broken(err)
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
			token, err := dec.Token()
			if err != nil {
				return nil, broken(err)
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
	if !utf8.ValidString(s) {
		return false
	}
	return !strings.ContainsFunc(s, unicode.IsControl)
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
